//! One frame: memory by tier, jobs, artifacts, clients, drives and links, errors.

use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::super::output::{bytes, milliseconds, printable, rate};
use super::list::{Cell, List, Look};
use super::model::{Model, Sample};
use crate::api::methods::{JobInfo, JobState};

/// Below this nothing useful can be shown, columns and lines.
const COLUMNS_MIN: u16 = 60;
const LINES_MIN: u16 = 16;
/// Lines of a list in which one row can be seen.
const LIST_LINES_MIN: usize = 3;
/// Most lines of the lists at the bottom.
const BOTTOM_LINES_MAX: usize = 8;
/// Cells of a bar.
const BAR_CELLS: u64 = 20;
const KEYS: &str = "q quit  Tab next list  ↑↓ scroll  s sort by the next column  r reverse";

/// The lists, in the order of the frame; the first three can be sorted and scrolled.
const LISTS: usize = 3;

/// What is shown, and how it is looked at.
#[derive(Debug, Default)]
pub(super) struct View {
    model: Option<Model>,
    /// Why the daemon does not answer, while it does not.
    pub(super) away: Option<String>,
    looks: [Look; LISTS],
    focused: usize,
}

impl View {
    /// Takes in a new look at the daemon.
    pub(super) fn update(&mut self, sample: Sample) {
        let before = self.model.take().map(|model| model.sample);
        // What was seen before it was away says nothing about now.
        let before = before.filter(|_| self.away.is_none());
        self.model = Some(Model::new(sample, before.as_ref()));
        self.away = None;
    }

    /// Turns to the next list, or to the one before.
    pub(super) fn focus(&mut self, step: isize) {
        self.focused = (self.focused + LISTS).wrapping_add_signed(step) % LISTS;
    }

    /// Sorts by the next column, or the one before; after the last one as the daemon gives it.
    pub(super) fn sort(&mut self, step: isize) {
        let Some(model) = &self.model else { return };
        // 0 stands for the daemon's order.
        let orders = lists(model)[self.focused].columns.len() + 1;
        let look = &mut self.looks[self.focused];
        let order = look.sort.map_or(0, |column| column + 1);
        look.sort = (order + orders).wrapping_add_signed(step).wrapping_rem(orders).checked_sub(1);
        look.top = 0;
    }

    /// Turns the order of the list round.
    pub(super) fn reverse(&mut self) {
        let look = &mut self.looks[self.focused];
        look.reverse = !look.reverse;
    }

    /// Scrolls by rows; the next frame corrects what goes too far.
    pub(super) fn scroll(&mut self, rows: isize) {
        let look = &mut self.looks[self.focused];
        look.top = look.top.saturating_add_signed(rows);
    }

    /// Scrolls by what a frame shows.
    pub(super) fn scroll_page(&mut self, pages: isize) {
        let page = isize::try_from(self.looks[self.focused].page).unwrap_or(isize::MAX);
        self.scroll(page.saturating_mul(pages));
    }

    /// Draws the frame in what room there is.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let area = frame.area();
        if area.width < COLUMNS_MIN || area.height < LINES_MIN {
            let message = format!(
                "too small: {} × {}\nneeded: {COLUMNS_MIN} × {LINES_MIN}\nq quits",
                area.width, area.height
            );
            return frame.render_widget(Paragraph::new(message), area);
        }
        let Some(model) = &self.model else {
            let message = match &self.away {
                Some(why) => format!("{}\nTrying again. q quits.", printable(why)),
                None => "Asking the daemon …".to_owned(),
            };
            return frame.render_widget(Paragraph::new(message), area);
        };
        let tiers = tiers(model);
        let [top, bottom] = &bottom(model);
        let bottom_lines = lines_of(top).max(lines_of(bottom)).min(BOTTOM_LINES_MAX);
        let lists = lists(model);
        let rest = usize::from(area.height).saturating_sub(2 + tiers.len() + bottom_lines);
        let heights = share(&lists.each_ref().map(lines_of), rest);
        let parts = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(tiers.len() as u16),
            Constraint::Length(heights[0] as u16),
            Constraint::Length(heights[1] as u16),
            Constraint::Length(heights[2] as u16),
            Constraint::Fill(1),
            Constraint::Length(bottom_lines as u16),
            Constraint::Length(1),
        ])
        .split(area);
        frame.render_widget(Paragraph::new(head(model, self.away.as_deref())), parts[0]);
        frame.render_widget(Paragraph::new(tiers), parts[1]);
        for (place, list) in lists.iter().enumerate() {
            let focused = place == self.focused;
            put(frame, list, &mut self.looks[place], focused, parts[2 + place]);
        }
        let [left, right] =
            Layout::horizontal([Constraint::Percentage(60), Constraint::Fill(1)]).areas(parts[6]);
        put(frame, top, &mut Look::default(), false, left);
        put(frame, bottom, &mut Look::default(), false, right);
        let dim = Style::new().add_modifier(Modifier::DIM);
        frame.render_widget(Paragraph::new(Line::styled(KEYS, dim)), parts[7]);
    }
}

/// The frame as text, as high as it must be to show all.
pub(super) fn text(model: &Model, columns: u16) -> String {
    let all: usize = lists(model).iter().map(lines_of).sum();
    let lines = 2 + tiers(model).len() + all + BOTTOM_LINES_MAX;
    let height = u16::try_from(lines).unwrap_or(u16::MAX).max(LINES_MIN);
    let mut view = View { model: Some(model.clone()), ..View::default() };
    let Ok(mut terminal) = Terminal::new(TestBackend::new(columns, height));
    let Ok(_) = terminal.draw(|frame| view.draw(frame));
    let buffer = terminal.backend().buffer();
    // Without the line of keys.
    let rows = (0..height - 1).map(|row| {
        let cells = (0..columns).filter_map(|column| buffer.cell((column, row)));
        cells.map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned()
    });
    let mut lines: Vec<String> = rows.collect();
    // What was left between the lists and the bottom.
    lines.dedup_by(|one, other| one.is_empty() && other.is_empty());
    lines.join("\n")
}

fn put(frame: &mut Frame<'_>, list: &List, look: &mut Look, focused: bool, area: Rect) {
    let lines = list.lines(look, focused, usize::from(area.width), usize::from(area.height));
    frame.render_widget(Paragraph::new(lines), area);
}

/// Lines that a list takes with all its rows.
fn lines_of(list: &List) -> usize {
    2 + list.rows.len()
}

/// Shares lines between lists: each gets what it needs, or at least what shows one row; who needs less leaves more.
fn share(wanted: &[usize; LISTS], lines: usize) -> [usize; LISTS] {
    let mut given = wanted.map(|wanted| wanted.min(LIST_LINES_MIN));
    while given.iter().sum::<usize>() < lines {
        let poorest =
            (0..LISTS).filter(|&place| given[place] < wanted[place]).min_by_key(|&place| given[place]);
        let Some(place) = poorest else { break };
        given[place] += 1;
    }
    given
}

fn head(model: &Model, away: Option<&str>) -> Line<'static> {
    let status = &model.sample.status;
    let strong = Style::new().add_modifier(Modifier::BOLD);
    let mut spans = vec![
        Span::styled(printable(&status.server), strong),
        Span::raw(format!(
            " on {}: {}, up {}; {} connections, {} leases",
            printable(&status.node),
            status.state,
            milliseconds(status.uptime_s as f64 * 1e3),
            status.connections,
            status.leases
        )),
    ];
    if let Some(why) = away {
        let alarm = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD | Modifier::REVERSED);
        spans.insert(0, Span::styled(format!(" {} ", printable(why).replace('\n', " ")), alarm));
        spans.insert(1, Span::raw(" last seen: "));
    }
    Line::from(spans)
}

/// `host   [#####---------------]  25 %  …`, one line for each tier.
fn tiers(model: &Model) -> Vec<Line<'static>> {
    let status = &model.sample.status;
    let host = &status.host;
    let mut lines = vec![tier(
        "host",
        host.resident_bytes,
        host.held_bytes.saturating_add(host.pool_bytes),
        host.budget_bytes,
        &format!("held {}, ready {}, pages {}", bytes(host.held_bytes), bytes(host.pool_bytes), host.pages),
    )];
    for gpu in &status.gpus {
        let lost = if gpu.lost { "LOST, " } else { "" };
        let more = format!("{lost}held {}, {}", bytes(gpu.held_bytes), gpu.name);
        let name = gpu.device.chars().take(12).collect::<String>();
        lines.push(tier(&name, gpu.resident_bytes, gpu.held_bytes, gpu.budget_bytes, &more));
    }
    lines
}

/// Resident bytes as `#`, what else counts against the budget as `+`.
fn tier(name: &str, resident: u64, other: u64, budget: u64, more: &str) -> Line<'static> {
    let cells = |bytes: u64| {
        let cells = u128::from(bytes) * u128::from(BAR_CELLS) / u128::from(budget.max(1));
        u64::try_from(cells).unwrap_or(BAR_CELLS).min(BAR_CELLS) as usize
    };
    let full = cells(resident);
    let taken = cells(resident.saturating_add(other)).max(full);
    let bar =
        format!("{}{}{}", "#".repeat(full), "+".repeat(taken - full), "-".repeat(BAR_CELLS as usize - taken));
    Line::from(vec![
        Span::styled(format!("{:<12} ", printable(name)), Style::new().add_modifier(Modifier::BOLD)),
        Span::styled(format!("[{bar}]"), Style::new().fg(Color::Cyan)),
        Span::raw(format!(" {} resident of {}, {}", bytes(resident), bytes(budget), printable(more))),
    ])
}

fn lists(model: &Model) -> [List; LISTS] {
    [jobs(model), artifacts(model), clients(model)]
}

fn text_cell(text: &str) -> Cell {
    Cell::Text(text.to_owned())
}

fn bytes_cell(count: u64) -> Cell {
    Cell::Number(count as f64, bytes(count))
}

fn count_cell(count: u64) -> Cell {
    Cell::Number(count as f64, count.to_string())
}

fn jobs(model: &Model) -> List {
    let (running, together, most) = model.running();
    let mut title = format!("jobs: {running} running");
    if running > 0 {
        title.push_str(&format!(", {}", rate(together)));
    }
    if let Some(most) = most {
        title.push_str(&format!(", {}-bound", printable(most)));
    }
    List {
        title,
        columns: &["SOURCE", "JOB", "DEVICE", "STATE", "DONE", "SIZE", "RATE", "LEFT", "BOTTLENECK"],
        rows: model.sample.jobs.iter().map(|job| job_row(model, job)).collect(),
        empty: "none",
    }
}

fn job_row(model: &Model, job: &JobInfo) -> Vec<Cell> {
    let state = match job.state {
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    };
    let done = u128::from(job.bytes.min(job.total)) * 100 / u128::from(job.total.max(1));
    let now = model.rates.jobs.get(&job.job).copied().unwrap_or(job.rate);
    // Why it failed takes the place of what it waits for.
    let reason = job.error.as_ref().map(|error| error.code.as_str()).or(job.bottleneck.as_deref());
    vec![
        text_cell(&job.artifact),
        count_cell(job.job),
        text_cell(&job.device),
        text_cell(state),
        Cell::Number(done as f64, format!("{done} %")),
        bytes_cell(job.total),
        Cell::Number(now, rate(now)),
        Cell::Number(
            job.eta_ms.map_or(-1.0, |eta| eta as f64),
            job.eta_ms.map_or_else(|| "-".to_owned(), |eta| milliseconds(eta as f64)),
        ),
        text_cell(reason.unwrap_or("-")),
    ]
}

fn artifacts(model: &Model) -> List {
    let artifacts = &model.sample.artifacts;
    let rows = artifacts.iter().map(|info| {
        let selected = if info.select.is_some() { " (selection)" } else { "" };
        vec![
            text_cell(&format!("{}{selected}", info.source)),
            text_cell(&info.device),
            text_cell(&info.state),
            bytes_cell(info.bytes),
            count_cell(info.leases.into()),
            text_cell(if info.pinned { "yes" } else { "no" }),
            text_cell(&info.pages),
            Cell::Number(info.idle_ms as f64, milliseconds(info.idle_ms as f64)),
        ]
    });
    List {
        title: format!("artifacts: {}", artifacts.len()),
        columns: &["SOURCE", "DEVICE", "STATE", "SIZE", "LEASES", "PINNED", "PAGES", "IDLE"],
        rows: rows.collect(),
        empty: "nothing is resident or loading",
    }
}

fn clients(model: &Model) -> List {
    let clients = &model.sample.status.clients;
    let rows = clients.iter().map(|client| {
        vec![
            text_cell(if client.name.is_empty() { "-" } else { &client.name }),
            count_cell(client.connection),
            text_cell(&client.tenant),
            Cell::Number(client.process.into(), client.process.to_string()),
            count_cell(client.leases.into()),
            bytes_cell(client.leased_bytes),
            count_cell(client.requests.into()),
        ]
    });
    List {
        title: format!("clients: {}", clients.len()),
        columns: &["NAME", "CONNECTION", "TENANT", "PROCESS", "LEASES", "LEASED", "UNANSWERED"],
        rows: rows.collect(),
        empty: "none",
    }
}

/// Drives and links; errors.
fn bottom(model: &Model) -> [List; 2] {
    let status = &model.sample.status;
    let rates = &model.rates;
    let mut rows = Vec::new();
    for drive in &status.drives {
        let now = rates.drives.get(&drive.drive).copied().unwrap_or_default();
        rows.push(vec![
            text_cell(&drive.drive),
            Cell::Number(now.read_bytes_per_s, format!("read {}", rate(now.read_bytes_per_s))),
            text_cell(&format!("{:.0} reads/s, {:.0} % busy", now.reads_per_s, now.busy * 100.0)),
        ]);
    }
    for link in &status.links {
        let now = rates.links.get(&link.link).copied();
        let moved = now.map_or_else(String::new, |now| format!("in {}", rate(now.received_bytes_per_s)));
        let mut more: Vec<String> =
            now.iter().map(|now| format!("out {}", rate(now.sent_bytes_per_s))).collect();
        if let Some(lanes) = link.lanes {
            more.push(format!("PCIe ×{lanes} of ×{}", link.lanes_max.unwrap_or(lanes)));
        }
        more.extend(link.bytes_per_s.map(|most| format!("of {}", rate(most as f64))));
        let received = now.map_or(0.0, |now| now.received_bytes_per_s);
        rows.push(vec![text_cell(&link.link), Cell::Number(received, moved), text_cell(&more.join(", "))]);
    }
    let errors = status.errors.iter().map(|error| {
        let new = rates.errors.get(&error.code);
        let new = new.map_or_else(String::new, |new| format!("+{new}"));
        vec![text_cell(&error.code), count_cell(error.count), text_cell(&new)]
    });
    // They are told to who may see everything; nobody else is told that there is none.
    let told = "none, or not for this user";
    [
        List { title: "drives and links".to_owned(), columns: &["NAME", "READ", "MORE"], rows, empty: told },
        List {
            title: "errors since the start".to_owned(),
            columns: &["CODE", "COUNT", "NEW"],
            rows: errors.collect(),
            empty: told,
        },
    ]
}
