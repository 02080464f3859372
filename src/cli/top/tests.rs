use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use serde_json::Value;

use super::*;
use crate::api::methods::{ClientStatus, JobInfo, JobState};

/// What a daemon answered to `node.status`, `job.list` and `artifact.list` while a load ran beside an attached client.
const RECORDED: &str = include_str!("recorded.json");

fn recorded() -> Sample {
    let document: Value = serde_json::from_str(RECORDED).unwrap();
    let part = |name: &str| document[name].clone();
    Sample {
        at: Instant::now(),
        status: serde_json::from_value(part("status")).unwrap(),
        jobs: serde_json::from_value(part("jobs")).unwrap(),
        artifacts: serde_json::from_value(part("artifacts")).unwrap(),
    }
}

fn frame(view: &mut View, columns: u16, lines: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal.draw(|frame| view.draw(frame)).unwrap();
    terminal.backend().to_string()
}

fn shown() -> View {
    let mut view = View::default();
    view.update(recorded());
    view
}

fn key(view: &mut View, code: KeyCode) -> bool {
    press(view, KeyEvent::new(code, KeyModifiers::NONE))
}

#[test]
fn a_frame_names_what_is_there() {
    let sample = recorded();
    let frame = frame(&mut shown(), 120, 40);
    let running = sample.jobs.iter().find(|job| job.state == JobState::Running).unwrap();
    let bound = format!("{}-bound", running.bottleneck.as_deref().unwrap());
    for part in ["jobs: 1 running", &bound, "artifacts: 2", "drives and links", "errors since the start"] {
        assert!(frame.contains(part), "no {part:?} in\n{frame}");
    }
    for job in &sample.jobs {
        assert!(frame.contains(&job.artifact), "{frame}");
    }
    for client in &sample.status.clients {
        assert!(frame.contains(&client.process.to_string()), "{frame}");
    }
    let held = sample.status.clients.iter().find(|client| client.leases == 1).unwrap();
    let line = frame.lines().find(|line| line.contains(&held.process.to_string())).unwrap();
    assert!(line.contains(&super::super::output::bytes(held.leased_bytes)), "{line}");
}

#[test]
fn rates_are_what_has_changed_by_the_time_that_went_by() {
    let (mut before, mut now) = (recorded(), recorded());
    now.at = before.at + Duration::from_secs(2);
    let running = now.jobs.iter_mut().find(|job| job.state == JobState::Running).unwrap();
    running.bytes += 3000;
    now.status.drives[0].read_bytes += 4000;
    now.status.drives[0].busy_ms += 500;
    now.status.errors[0].count += 3;
    let number = running.job;
    let rates = Model::new(now.clone(), Some(&before)).rates;
    assert_eq!(rates.jobs[&number], 1500.0);
    let drive = rates.drives[&now.status.drives[0].drive];
    assert_eq!((drive.read_bytes_per_s, drive.busy), (2000.0, 0.25));
    assert_eq!(rates.errors[&now.status.errors[0].code], 3);
    // Of a daemon that was started anew nothing is compared.
    before.status.uptime_s = now.status.uptime_s + 1;
    assert_eq!(Model::new(now, Some(&before)).rates.seconds, 0.0);
}

#[test]
fn keys_sort_scroll_turn_and_leave() {
    let mut view = shown();
    assert!(frame(&mut view, 100, 30).contains("SOURCE "));
    key(&mut view, KeyCode::Char('s'));
    assert!(frame(&mut view, 100, 30).contains("SOURCE▼"));
    key(&mut view, KeyCode::Char('r'));
    assert!(frame(&mut view, 100, 30).contains("SOURCE▲"));
    key(&mut view, KeyCode::Char('S'));
    assert!(!frame(&mut view, 100, 30).contains('▲'), "in the daemon's order again");
    let mut sample = recorded();
    let client = sample.status.clients[0].clone();
    sample.status.clients =
        (1000..1100).map(|connection| ClientStatus { connection, ..client.clone() }).collect();
    view.update(sample);
    key(&mut view, KeyCode::BackTab);
    key(&mut view, KeyCode::Char('r'));
    assert!(frame(&mut view, 100, 30).contains("1099"));
    key(&mut view, KeyCode::End);
    let end = frame(&mut view, 100, 30);
    assert!(end.contains("1000") && !end.contains("1099"), "{end}");
    key(&mut view, KeyCode::PageUp);
    key(&mut view, KeyCode::Home);
    assert!(frame(&mut view, 100, 30).contains("1099"));
    for leave in [KeyCode::Char('q'), KeyCode::Esc] {
        assert!(!key(&mut view, leave));
    }
    assert!(!press(&mut view, KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    assert!(key(&mut view, KeyCode::Char('c')));
}

#[test]
fn every_size_is_drawn_and_a_small_one_says_what_it_needs() {
    let mut view = shown();
    for columns in (1..200).step_by(7) {
        for lines in 1..50 {
            frame(&mut view, columns, lines);
        }
    }
    assert!(frame(&mut view, 40, 10).contains("needed: 60 × 16"));
    assert!(frame(&mut View::default(), 80, 24).contains("Asking the daemon"));
}

#[test]
fn a_daemon_that_is_away_is_said_to_be_and_what_was_seen_stays() {
    let mut view = shown();
    view.away = Some("cannot reach the daemon".to_owned());
    let away = frame(&mut view, 120, 40);
    assert!(away.contains("cannot reach the daemon") && away.contains("jobs: 1 running"), "{away}");
    view.update(recorded());
    assert!(!frame(&mut view, 120, 40).contains("cannot reach"));
    let mut never = View::default();
    never.away = Some("no daemon".to_owned());
    assert!(frame(&mut never, 80, 24).contains("no daemon"));
}

#[test]
fn the_frame_as_text_shows_every_row() {
    let mut sample = recorded();
    let job = sample.jobs[0].clone();
    sample.jobs = (1000..1200).map(|number| JobInfo { job: number, ..job.clone() }).collect();
    let text = view::text(&Model::new(sample, None), 100);
    for number in 1000..1200 {
        assert!(text.contains(&number.to_string()), "{number}");
    }
    assert!(!text.contains("q quit"));
}
