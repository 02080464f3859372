//! A report as one HTML file: nothing is fetched from elsewhere, nothing is executed, light and dark follow the reader.

use super::report::{Report, Table};
use crate::cli::output::{Column, printable};

/// Text in HTML and in attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in printable(text).chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2126; --dim: #5d6770; --page: #fbfbfa; --card: #fff; --rule: #d9dde1;
  --c0: #2f6db5; --c1: #c76a1c; --c2: #3d8a4f; --c3: #9b4f96; --c4: #b03a45; --c5: #557a83; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --dim: #9aa5ae; --page: #15181b; --card: #1d2125; --rule: #363c42;
  --c0: #6aa5e8; --c1: #eb9a54; --c2: #74c087; --c3: #cf8cca; --c4: #e5808a; --c5: #8fb7c1; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 860px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.found { font-size: 1.1rem; } .dim, .mark { color: var(--dim); fill: var(--dim); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; } .right { text-align: right; }
figure { margin: 1rem 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .5rem; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg text.mark { fill: var(--dim); } svg text.value { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; } .spread { stroke: var(--ink); stroke-width: 1.5; } .dot { fill: var(--ink); opacity: .55; }
polyline { fill: none; stroke-width: 2; } .thin { stroke-width: 1.2; opacity: .6; }
";

/// The whole document.
pub(super) fn document(report: &Report) -> String {
    let colours: String = (0..6)
        .map(|n| {
            format!(".fill{n} {{ fill: var(--c{n}); }} .line{n} {{ stroke: var(--c{n}); }} svg text.name{n} {{ fill: var(--c{n}); }}\n")
        })
        .collect();
    let title = format!("lodestream bench {}", report.bench);
    let plots: String = report.plots.iter().map(super::plot::Plot::svg).collect();
    let notes: String = report.notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
    let machine = report
        .machine
        .iter()
        .map(|(what, how)| format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(what), escape(how)));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}{colours}</style>\n</head>\n\
         <body>\n<h1>{title}</h1>\n<p class=\"dim\">{version}</p>\n<p class=\"found\">{found}</p>\n{plots}\
         <h2>Figures</h2>\n{table}<h2>How it was measured</h2>\n<ul>\n{notes}</ul>\n\
         <h2>Machine</h2>\n<table>\n{machine}</table>\n</body>\n</html>\n",
        version = escape(report.version),
        found = escape(&report.found),
        table = table(&report.table),
        machine = machine.collect::<String>(),
    )
}

fn table(table: &Table) -> String {
    let of = |column: &Column| match column {
        Column::Left(name) => (*name, ""),
        Column::Right(name) => (*name, " class=\"right\""),
    };
    let head = table.columns.iter().map(|column| {
        let (name, class) = of(column);
        format!("<th{class}>{}</th>", escape(name))
    });
    let rows = table.rows.iter().map(|row| {
        let cells = row
            .iter()
            .zip(table.columns)
            .map(|(cell, column)| format!("<td{}>{}</td>", of(column).1, escape(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    });
    format!("<table>\n<tr>{}</tr>\n{}</table>\n", head.collect::<String>(), rows.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_stands_by_itself_and_what_it_names_cannot_break_it() {
        let report = Report {
            bench: "load",
            version: "v",
            found: "<script>alert(1)</script>".to_owned(),
            machine: vec![("drive".to_owned(), "a\"b\u{1b}".to_owned())],
            table: Table {
                columns: &[Column::Left("NAME"), Column::Right("SIZE")],
                rows: vec![vec!["x&y".to_owned(), "1".to_owned()]],
            },
            plots: Vec::new(),
            notes: vec!["n".to_owned()],
            figures: serde_json::Value::Null,
        };
        let text = document(&report);
        assert!(!text.contains("<script") && !text.contains('\u{1b}') && text.contains("x&amp;y"), "{text}");
        assert!(
            !text.contains("src=") && !text.contains("href=") && !text.contains("url("),
            "nothing from elsewhere"
        );
        assert!(text.contains("prefers-color-scheme: dark"));
    }
}
