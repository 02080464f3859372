//! Plots as inline SVG. Colours come from the document's style, so that they follow its light or dark.

use std::fmt::Write;

use super::html::escape;
use crate::measure::rounds::Summary;

/// Sizes in units of the picture.
const WIDTH: f64 = 760.0;
const LABEL: f64 = 190.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 22.0;
const ROW: f64 = 34.0;
const TOP: f64 = 10.0;
const AXIS: f64 = 36.0;
const LINES_HEIGHT: f64 = 300.0;
const LINES_LEFT: f64 = 60.0;
/// Colours that the style has.
const COLOURS: usize = 6;

/// A picture of figures.
#[derive(Debug)]
pub(super) enum Plot {
    /// One bar each.
    Bars {
        title: String,
        /// Of the axis.
        unit: &'static str,
        bars: Vec<Bar>,
    },
    /// One line each over common places.
    Lines {
        title: String,
        unit: &'static str,
        /// What the places are.
        across: &'static str,
        places: Vec<String>,
        series: Vec<Series>,
    },
}

/// A bar to the median, with the spread as a line and each value as a dot.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) summary: Summary,
    pub(super) values: Vec<f64>,
}

/// A line through medians, with the spread at each.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: String,
    /// By place.
    pub(super) points: Vec<Option<Summary>>,
}

impl Plot {
    /// A figure with its caption.
    pub(super) fn svg(&self) -> String {
        match self {
            Plot::Bars { title, unit, bars } => figure(title, &bars_svg(title, unit, bars)),
            Plot::Lines { title, unit, across, places, series } => {
                figure(title, &lines_svg(title, (unit, across), places, series))
            }
        }
    }
}

fn figure(title: &str, svg: &str) -> String {
    format!("<figure>\n<figcaption>{}</figcaption>\n{svg}</figure>\n", escape(title))
}

/// A round number at or above `most`, and the step between marks.
fn scale(most: f64) -> (f64, f64) {
    let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
    let power = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| step * 5.0 >= most * 0.999_999);
    let step = step.unwrap_or(power * 10.0);
    ((most / step * 0.999_999).ceil() * step, step)
}

/// A number with as many digits as it takes to tell marks of this step apart.
fn mark(value: f64, step: f64) -> String {
    let digits = if step >= 1.0 && step.fract() == 0.0 {
        0
    } else {
        (1.0 - step.log10().floor()).clamp(1.0, 6.0) as usize
    };
    format!("{value:.digits$}")
}

/// Three digits that count.
fn shown(value: f64) -> String {
    match value.abs() {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn open(title: &str, height: f64) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\" xmlns=\"http://www.w3.org/2000/svg\">\n",
        escape(title)
    )
}

fn bars_svg(title: &str, unit: &str, bars: &[Bar]) -> String {
    let height = TOP + ROW * bars.len() as f64 + AXIS;
    let bottom = height - AXIS;
    let (end, step) = scale(bars.iter().map(|bar| bar.summary.most).fold(0.0, f64::max));
    let at = |value: f64| LABEL + (value / end).clamp(0.0, 1.0) * (WIDTH - LABEL - RIGHT);
    let mut svg = open(title, height);
    // Writing to a String cannot fail.
    for index in 0..=(end / step).round() as u32 {
        let value = f64::from(index) * step;
        let x = at(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>"
        );
        let y = bottom + 15.0;
        let _ = writeln!(
            svg,
            "<text class=\"mark\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
            mark(value, step)
        );
    }
    let (x, y) = (at(end / 2.0), bottom + 31.0);
    let _ = writeln!(
        svg,
        "<text class=\"mark\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
        escape(unit)
    );
    for (place, bar) in bars.iter().enumerate() {
        let top = TOP + ROW * place as f64 + (ROW - BAR) / 2.0;
        let middle = top + BAR / 2.0;
        let Summary { median, least, most, .. } = bar.summary;
        let (left, width) = (at(0.0), at(median) - at(0.0));
        let _ = writeln!(
            svg,
            "<text text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LABEL - 8.0,
            middle + 4.0,
            escape(&bar.name)
        );
        let colour = place % COLOURS;
        let _ = writeln!(
            svg,
            "<rect class=\"fill{colour}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>"
        );
        let _ = writeln!(
            svg,
            "<line class=\"spread\" x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\"/>",
            at(least),
            at(most)
        );
        for value in &bar.values {
            let _ = writeln!(
                svg,
                "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2.5\"/>",
                at(*value)
            );
        }
        let _ = writeln!(
            svg,
            "<text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            at(most) + 8.0,
            middle + 4.0,
            shown(median)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn lines_svg(title: &str, (unit, across): (&str, &str), places: &[String], series: &[Series]) -> String {
    let height = LINES_HEIGHT + AXIS + TOP;
    let bottom = height - AXIS;
    let every = || series.iter().flat_map(|series| series.points.iter().flatten());
    let (end, step) = scale(every().map(|summary| summary.most).fold(0.0, f64::max));
    let right = WIDTH - RIGHT;
    let x =
        |place: usize| LINES_LEFT + (right - LINES_LEFT) * (place as f64 + 0.5) / places.len().max(1) as f64;
    let y = |value: f64| bottom - (value / end).clamp(0.0, 1.0) * (bottom - TOP);
    let mut svg = open(title, height);
    for index in 0..=(end / step).round() as u32 {
        let value = f64::from(index) * step;
        let at = y(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LINES_LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>"
        );
        let (left, text) = (LINES_LEFT - 6.0, at + 4.0);
        let _ = writeln!(
            svg,
            "<text class=\"mark\" text-anchor=\"end\" x=\"{left}\" y=\"{text:.1}\">{}</text>",
            mark(value, step)
        );
    }
    for (place, name) in places.iter().enumerate() {
        let (x, y) = (x(place), bottom + 15.0);
        let _ = writeln!(
            svg,
            "<text class=\"mark\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
            escape(name)
        );
    }
    let (middle, below) = ((LINES_LEFT + right) / 2.0, bottom + 31.0);
    let _ = writeln!(
        svg,
        "<text class=\"mark\" text-anchor=\"middle\" x=\"{middle:.1}\" y=\"{below:.1}\">{}</text>",
        escape(across)
    );
    let _ = writeln!(
        svg,
        "<text class=\"mark\" text-anchor=\"middle\" transform=\"translate(14 {:.1}) rotate(-90)\">{}</text>",
        (TOP + bottom) / 2.0,
        escape(unit)
    );
    // Names at the ends of the lines, moved apart where they would cover each other.
    let mut ends: Vec<(usize, f64)> = Vec::new();
    for (number, series) in series.iter().enumerate() {
        let colour = number % COLOURS;
        let points: Vec<(f64, &Summary)> = series
            .points
            .iter()
            .enumerate()
            .filter_map(|(place, point)| Some((x(place), point.as_ref()?)))
            .collect();
        for (x, point) in &points {
            let _ = writeln!(
                svg,
                "<line class=\"line{colour} thin\" x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>",
                y(point.least),
                y(point.most)
            );
            let _ = writeln!(
                svg,
                "<circle class=\"fill{colour}\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3.5\"/>",
                y(point.median)
            );
        }
        let path: Vec<String> =
            points.iter().map(|(x, point)| format!("{x:.1},{:.1}", y(point.median))).collect();
        let _ = writeln!(svg, "<polyline class=\"line{colour}\" points=\"{}\"/>", path.join(" "));
        if let Some((_, last)) = points.last() {
            ends.push((number, y(last.median)));
        }
    }
    ends.sort_by(|one, other| one.1.total_cmp(&other.1));
    let mut free = f64::NEG_INFINITY;
    for (number, wanted) in ends {
        let at = wanted.max(free);
        free = at + 15.0;
        let _ = writeln!(
            svg,
            "<text class=\"name{}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            number % COLOURS,
            right + 6.0,
            at + 4.0,
            escape(&series[number].name)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_end_on_a_round_number_above_all_values() {
        for (most, end, step) in
            [(0.95, 1.0, 0.2), (1.0, 1.0, 0.2), (1.06, 1.25, 0.25), (12.3, 12.5, 2.5), (430.0, 500.0, 100.0)]
        {
            let found = scale(most);
            assert!((found.0 - end).abs() < 1e-9 && (found.1 - step).abs() < 1e-9, "{most}: {found:?}");
        }
        for odd in [0.0, f64::NAN, f64::INFINITY, -1.0] {
            assert_eq!(scale(odd).0, 1.0);
        }
        assert_eq!(
            (mark(0.25, 0.25), mark(100.0, 100.0), mark(2.5, 2.5)),
            ("0.25".to_owned(), "100".to_owned(), "2.5".to_owned())
        );
    }

    #[test]
    fn names_are_escaped_and_every_value_is_drawn() {
        let summary = Summary::of([1.0, 2.0, 3.0]).unwrap();
        let bar = Bar { name: "<a & b>".to_owned(), summary, values: vec![1.0, 2.0, 3.0] };
        let svg = Plot::Bars { title: "t".to_owned(), unit: "u", bars: vec![bar] }.svg();
        assert!(svg.contains("&lt;a &amp; b&gt;") && !svg.contains("<a &"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 3);
        let series = Series { name: "s".to_owned(), points: vec![Some(summary), None] };
        let places = vec!["1".to_owned(), "2".to_owned()];
        let svg =
            Plot::Lines { title: "t".to_owned(), unit: "u", across: "x", places, series: vec![series] }.svg();
        assert_eq!(svg.matches("<circle").count(), 1);
    }
}
