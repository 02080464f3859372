//! `lodestream top`: what the daemon does, live.
//!
//! A thread of its own asks the daemon, so that keys are answered while the daemon does not.

mod list;
mod model;
mod screen;
mod view;

#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::json;

use super::{Context, parse};
use crate::client::Client;
use crate::error::{Code, Error, Result};
use model::{Model, Sample};
use screen::Screen;
use view::View;

/// How long a key may wait for its answer while nothing else happens.
const KEY_WAIT: Duration = Duration::from_millis(100);
/// A daemon that has not answered for so much longer than the interval is said not to answer.
const SILENCE: Duration = Duration::from_secs(3);
/// Shorter intervals would measure the questions.
const INTERVAL_MS_MIN: u64 = 100;
/// Width of a frame that no terminal decides, columns.
const FRAME_COLUMNS: u16 = 120;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Time between two looks, such as 500ms or 2s
    #[arg(long, value_name = "DURATION", value_parser = interval, default_value = "1s")]
    interval: u64,

    /// Print one frame as text and exit; rates are of one interval
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<u64, String> {
    match parse::duration_ms(text)? {
        ms if ms < INTERVAL_MS_MIN => Err(format!("at least {INTERVAL_MS_MIN}ms")),
        ms => Ok(ms),
    }
}

/// Shows the node until a key or a signal ends it; with `--once` or `--json`, one frame.
pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let interval = Duration::from_millis(args.interval);
    if args.once || context.output.is_json() {
        let model = Sampler::start(&context.socket, interval)?.two()?;
        let Sample { status, jobs, artifacts, .. } = &model.sample;
        let document = json!({"status": status, "jobs": jobs, "artifacts": artifacts, "rates": model.rates});
        return context.output.result(&document, || view::text(&model, FRAME_COLUMNS));
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "stdin and stdout are no terminal: use --once for a frame as text, or --json";
        return Err(Error::new(Code::CliUsage, message));
    }
    let sampler = Sampler::start(&context.socket, interval)?;
    let mut screen = Screen::take().map_err(|error| terminal_error(&error))?;
    let shown = show(&mut screen, &sampler, interval + SILENCE);
    drop(screen);
    shown.map_err(|error| terminal_error(&error))
}

fn terminal_error(error: &io::Error) -> Error {
    Error::new(Code::Internal, format!("the terminal cannot be used: {error}"))
}

fn show(screen: &mut Screen, sampler: &Sampler, silence: Duration) -> io::Result<()> {
    let mut view = View::default();
    let mut heard = Instant::now();
    while !screen.ends() {
        while let Ok(sample) = sampler.samples.try_recv() {
            heard = Instant::now();
            match sample {
                Ok(sample) => view.update(sample),
                Err(error) => view.away = Some(error.message),
            }
        }
        if heard.elapsed() > silence {
            view.away = Some(format!("the daemon has not answered for {} s", heard.elapsed().as_secs()));
        }
        screen.draw(|frame| view.draw(frame))?;
        if event::poll(KEY_WAIT)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release && !press(&mut view, key) => {
                    return Ok(());
                }
                // A new size is seen by the next draw.
                _ => {}
            }
        }
    }
    Ok(())
}

/// Does what a key is for. `false`: to leave.
fn press(view: &mut View, key: KeyEvent) -> bool {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Tab | KeyCode::Right => view.focus(1),
        KeyCode::BackTab | KeyCode::Left => view.focus(-1),
        KeyCode::Char('s') => view.sort(1),
        KeyCode::Char('S') => view.sort(-1),
        KeyCode::Char('r') => view.reverse(),
        KeyCode::Down | KeyCode::Char('j') => view.scroll(1),
        KeyCode::Up | KeyCode::Char('k') => view.scroll(-1),
        KeyCode::PageDown => view.scroll_page(1),
        KeyCode::PageUp => view.scroll_page(-1),
        KeyCode::Home => view.scroll(isize::MIN),
        KeyCode::End => view.scroll(isize::MAX),
        _ => {}
    }
    true
}

/// The thread that asks the daemon, and goes on when the daemon is away.
struct Sampler {
    samples: Receiver<Result<Sample>>,
    /// Ends the thread when it is dropped.
    _stop: Sender<()>,
}

impl Sampler {
    fn start(socket: &Path, interval: Duration) -> Result<Sampler> {
        let (sender, samples) = crossbeam_channel::bounded(1);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let socket = socket.to_owned();
        let body = move || sample_until(&stopped, &socket, interval, &sender);
        std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(body)
            .map_err(|error| Error::new(Code::Internal, format!("no thread can be started: {error}")))?;
        Ok(Sampler { samples, _stop: stop })
    }

    /// Two samples, one interval apart, which is what rates are made of.
    fn two(&self) -> Result<Model> {
        let next = || {
            let gone = |_| Error::new(Code::Internal, "the thread that asks the daemon has ended");
            self.samples.recv().map_err(gone)?
        };
        let first = next()?;
        Ok(Model::new(next()?, Some(&first)))
    }
}

fn sample_until(stopped: &Receiver<()>, socket: &Path, interval: Duration, out: &Sender<Result<Sample>>) {
    let mut client: Option<Client> = None;
    loop {
        let sample = match &mut client {
            Some(client) => Sample::take(client),
            None => Client::connect(socket).and_then(|new| {
                let client = client.insert(new);
                client.hello()?;
                Sample::take(client)
            }),
        };
        if sample.is_err() {
            client = None;
        }
        if out.send(sample).is_err() || stopped.recv_timeout(interval) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}
