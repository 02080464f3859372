//! The terminal while `top` has it: put back on every way out, by a key, an error, a panic or a signal.

use std::io;
use std::mem::ManuallyDrop;
use std::time::Duration;

use crossbeam_channel::{Receiver, TryRecvError};
use ratatui::crossterm::terminal::disable_raw_mode;
use ratatui::{DefaultTerminal, Frame};
use tokio::signal::unix::{SignalKind, signal};

/// How long a terminal that takes nothing more (stopped output, nobody reads) may keep the process after a signal.
const STUCK: Duration = Duration::from_secs(2);
/// Exit code after that.
const STUCK_EXIT_CODE: i32 = 1;

/// The terminal in raw mode, with its alternate screen, until this is dropped.
pub(super) struct Screen {
    /// Not dropped: where the terminal is gone, it would say so on stderr, which is that terminal, and panic.
    terminal: ManuallyDrop<DefaultTerminal>,
    /// Closed when a signal asks for the end.
    end: Receiver<()>,
}

impl Screen {
    /// Takes the terminal. From here on a panic, too, puts it back.
    pub(super) fn take() -> io::Result<Screen> {
        let end = end_by_signal()?;
        match ratatui::try_init() {
            Ok(terminal) => Ok(Screen { terminal: ManuallyDrop::new(terminal), end }),
            Err(error) => {
                // Some of it may have been done.
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }

    /// Draws a frame.
    pub(super) fn draw(&mut self, frame: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(frame).map(|_| ())
    }

    /// Whether a signal has asked for the end.
    pub(super) fn ends(&self) -> bool {
        self.end.try_recv() == Err(TryRecvError::Disconnected)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Errors: there is no terminal any more, and nothing to put back.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// A channel that is closed by SIGHUP, SIGINT, SIGQUIT and SIGTERM, which end the process no more by themselves.
fn end_by_signal() -> io::Result<Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let entered = runtime.enter();
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut terminate = signal(SignalKind::terminate())?;
    drop(entered);
    let (sender, end) = crossbeam_channel::bounded(0);
    let body = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = hangup.recv() => {}
                _ = interrupt.recv() => {}
                _ = quit.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        drop(sender);
        // It ends with the process, unless that hangs in a write to the terminal.
        std::thread::park_timeout(STUCK);
        let _ = disable_raw_mode();
        std::process::exit(STUCK_EXIT_CODE);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(body)?;
    Ok(end)
}
