//! A list that can be sorted and scrolled, as lines of text.

use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};

use super::super::output::printable;

/// Columns between two cells.
const GAP: usize = 2;
/// A text column is not cut below this many columns.
const TEXT_COLUMNS_MIN: usize = 8;

/// One cell: what is shown, and what it is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    /// Set to the left.
    Text(String),
    /// Set to the right: the number, and how it reads.
    Number(f64, String),
}

impl Cell {
    fn shown(&self) -> &str {
        match self {
            Cell::Text(text) | Cell::Number(_, text) => text,
        }
    }
}

/// A list as the daemon gives it.
#[derive(Debug, Clone, Default)]
pub(super) struct List {
    pub(super) title: String,
    pub(super) columns: &'static [&'static str],
    pub(super) rows: Vec<Vec<Cell>>,
    /// What stands there if there is no row.
    pub(super) empty: &'static str,
}

/// How a list is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// The column that it is sorted by; none: as the daemon gives it.
    pub(super) sort: Option<usize>,
    pub(super) reverse: bool,
    /// The first row that is shown.
    pub(super) top: usize,
    /// Rows that the last frame had room for.
    pub(super) page: usize,
}

impl List {
    /// The rows in the order of `look`.
    fn sorted(&self, look: Look) -> Vec<&Vec<Cell>> {
        let mut rows: Vec<&Vec<Cell>> = self.rows.iter().collect();
        if let Some(column) = look.sort {
            rows.sort_by(|one, other| match (&one[column], &other[column]) {
                // The most first: that is what one looks for.
                (Cell::Number(one, _), Cell::Number(other, _)) => other.total_cmp(one),
                (one, other) => one.shown().cmp(other.shown()),
            });
        }
        if look.reverse {
            rows.reverse();
        }
        rows
    }

    /// A title, a head and as many rows as `height` has room for. Corrects what does not fit in `look`.
    pub(super) fn lines(
        &self,
        look: &mut Look,
        focused: bool,
        width: usize,
        height: usize,
    ) -> Vec<Line<'static>> {
        look.page = height.saturating_sub(2);
        look.top = look.top.min(self.rows.len().saturating_sub(look.page));
        let rows = self.sorted(*look);
        let seen = &rows[look.top..rows.len().min(look.top + look.page)];
        let more = if seen.len() < rows.len() {
            format!(", rows {}–{} of {}", look.top + 1, look.top + seen.len(), rows.len())
        } else {
            String::new()
        };
        let title = format!("─ {}{more} ", self.title);
        let rule = "─".repeat(width.saturating_sub(title.chars().count()));
        let strong = if focused { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
        let mut lines = vec![Line::styled(format!("{title}{rule}"), strong)];
        if self.rows.is_empty() {
            lines.push(Line::styled(format!("  {}", self.empty), Style::new().add_modifier(Modifier::DIM)));
            lines.truncate(height);
            return lines;
        }
        let widths = self.widths(width, look.sort);
        let head = self.columns.iter().enumerate().zip(&widths).map(|((place, name), &width)| {
            let right = matches!(self.rows[0][place], Cell::Number(..));
            let arrow = if look.reverse { '▲' } else { '▼' };
            let name = if look.sort == Some(place) { format!("{name}{arrow}") } else { (*name).to_owned() };
            set(&name, width, right)
        });
        let head: Vec<String> = head.collect();
        lines.push(Line::styled(head.join(&" ".repeat(GAP)), Style::new().add_modifier(Modifier::DIM)));
        for row in seen {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| {
                set(&printable(cell.shown()).replace('\n', " "), width, matches!(cell, Cell::Number(..)))
            });
            lines.push(Line::from(Span::raw(cells.collect::<Vec<_>>().join(&" ".repeat(GAP)))));
        }
        lines.truncate(height);
        lines
    }

    /// As wide as the widest cell; where that does not fit, the first text column gives way.
    fn widths(&self, width: usize, sort: Option<usize>) -> Vec<usize> {
        let widest = |(place, name): (usize, &&str)| {
            let arrow = usize::from(sort == Some(place));
            let cells = self.rows.iter().map(|row| printable(row[place].shown()).chars().count());
            cells.max().unwrap_or(0).max(name.chars().count() + arrow)
        };
        let mut widths: Vec<usize> = self.columns.iter().enumerate().map(widest).collect();
        let all = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        let flexible =
            self.rows.first().and_then(|row| row.iter().position(|cell| matches!(cell, Cell::Text(_))));
        if let (Some(over), Some(place)) = (all.checked_sub(width), flexible) {
            widths[place] = widths[place].saturating_sub(over).max(TEXT_COLUMNS_MIN.min(widths[place]));
        }
        widths
    }
}

/// Text in `width` columns. Of what is too long the end is kept: that is what tells paths apart.
fn set(text: &str, width: usize, right: bool) -> String {
    let count = text.chars().count();
    if count > width {
        let end: String = text.chars().skip(count + 1 - width.max(1)).collect();
        return format!("…{end}");
    }
    let space = " ".repeat(width - count);
    if right { format!("{space}{text}") } else { format!("{text}{space}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> List {
        let row =
            |name: &str, size: f64| vec![Cell::Text(name.to_owned()), Cell::Number(size, size.to_string())];
        List {
            title: "things".to_owned(),
            columns: &["NAME", "SIZE"],
            rows: vec![row("/models/first", 1.0), row("/models/third", 3.0), row("/models/second", 2.0)],
            empty: "none",
        }
    }

    fn text(list: &List, look: &mut Look, width: usize, height: usize) -> Vec<String> {
        list.lines(look, false, width, height).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn numbers_are_sorted_with_the_most_first_and_texts_by_letter() {
        let names = |sort, reverse| -> Vec<String> {
            let mut look = Look { sort, reverse, ..Look::default() };
            let lines = text(&list(), &mut look, 40, 10);
            lines[2..]
                .iter()
                .map(|line| line.split_whitespace().next().unwrap().replace("/models/", ""))
                .collect()
        };
        assert_eq!(names(None, false), ["first", "third", "second"]);
        assert_eq!(names(Some(1), false), ["third", "second", "first"]);
        assert_eq!(names(Some(1), true), ["first", "second", "third"]);
        assert_eq!(names(Some(0), false), ["first", "second", "third"]);
    }

    #[test]
    fn what_does_not_fit_is_scrolled_and_said() {
        let mut look = Look { top: 99, ..Look::default() };
        let lines = text(&list(), &mut look, 40, 4);
        assert_eq!(look, Look { top: 1, page: 2, ..Look::default() });
        assert!(lines[0].starts_with("─ things, rows 2–3 of 3 ─"), "{}", lines[0]);
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line.chars().count() <= 40));
        assert_eq!(text(&list(), &mut look, 40, 0).len(), 0);
    }

    #[test]
    fn a_name_that_is_too_long_keeps_its_end_and_steers_no_terminal() {
        let mut list = list();
        list.rows[0][0] = Cell::Text("\u{1b}[2J/a/very/long/way/to/the/model".to_owned());
        let lines = text(&list, &mut Look::default(), 20, 10);
        assert!(lines[2].starts_with('…') && lines[2].contains("the/model") && !lines[2].contains('\u{1b}'));
    }
}
