//! Charts as inline SVG, through `plotters`.
//!
//! Colours are drawn as placeholders and replaced by CSS variables, so that one drawing serves light, dark and
//! print. Series also differ by marker, bars by fill against outline: nothing is told by colour alone. Drawings
//! are about as wide as a phone, so that their text is never shrunk much, only enlarged.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::options::TrainingPoint;
use super::words::escape;
use crate::BenchError;
use crate::stats::{Estimate, percentile};
use crate::summary::Summary;

/// Width of every drawing.
const WIDTH: u32 = 400;
/// Series that one chart can tell apart.
pub(super) const SERIES_MAX: usize = 6;

/// Placeholders and the CSS variables that replace them.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(4, 5, 6);
const PLAIN: RGBColor = RGBColor(7, 8, 9);
const PAPER: RGBColor = RGBColor(10, 11, 12);
const SERIES: [RGBColor; SERIES_MAX] = [
    RGBColor(13, 14, 15),
    RGBColor(16, 17, 18),
    RGBColor(19, 20, 21),
    RGBColor(22, 23, 24),
    RGBColor(25, 26, 27),
    RGBColor(28, 29, 30),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

/// Draws a chart and turns it into an accessible, themable SVG element.
fn svg(
    title: &'static str,
    description: &str,
    height: u32,
    draw: impl FnOnce(&Area<'_>) -> DrawResult,
) -> Result<String, BenchError> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        let drawn = draw(&root).and_then(|()| root.present().map_err(Into::into));
        drawn.map_err(|e| BenchError::Chart { chart: title, problem: e.to_string() })?;
    }
    let body = text.find('>').map_or("", |end| &text[end + 1..]);
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\"><title>{}</title><desc>{}</desc>{body}",
        escape(title),
        escape(description)
    );
    let mut replace = |color: RGBColor, variable: &str| {
        out = out.replace(
            &format!("\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2),
            &format!("\"var(--{variable})\""),
        );
    };
    replace(INK, "ink");
    replace(GRID, "grid");
    replace(PLAIN, "plain");
    replace(PAPER, "paper");
    for (i, color) in SERIES.iter().enumerate() {
        replace(*color, &format!("s{i}"));
    }
    Ok(out)
}

fn text_style(size: u32, color: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    // plotters divides font sizes by 1.24 when it writes SVG.
    let mut style = TextStyle::from(("sans-serif", f64::from(size) * 1.24).into_font()).pos(Pos::new(h, v));
    style.color = color.to_backend_color();
    style
}

/// At most `max` characters, cut with an ellipsis.
fn short(name: &str, max: usize) -> String {
    match name.char_indices().nth(max) {
        None => name.to_owned(),
        Some(_) => name.chars().take(max - 1).chain(['…']).collect(),
    }
}

/// A round step that gives about `count` ticks over `span`.
fn tick_step(span: f64, count: f64) -> f64 {
    let raw = (span / count).max(1e-9);
    let magnitude = 10f64.powf(raw.log10().floor());
    let unit = raw / magnitude;
    magnitude
        * if unit <= 1.0 {
            1.0
        } else if unit <= 2.0 {
            2.0
        } else if unit <= 5.0 {
            5.0
        } else {
            10.0
        }
}

fn ticks(low: f64, high: f64, count: f64) -> (f64, Vec<f64>) {
    let step = tick_step(high - low, count);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (step, (first..=last).map(|i| i as f64 * step).collect())
}

fn tick_label(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 4.0) as usize;
    format!("{value:.digits$}")
}

/// Pixel frame of a chart with a linear x axis below and named rows at the left.
struct RowFrame {
    left: i32,
    right: i32,
    top: i32,
    row: i32,
    rows: i32,
    low: f64,
    high: f64,
}

impl RowFrame {
    fn x(&self, value: f64) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        self.left + (share * f64::from(self.right - self.left)).round() as i32
    }

    fn y(&self, row: usize) -> i32 {
        self.top + self.row * row as i32 + self.row / 2
    }

    fn bottom(&self) -> i32 {
        self.top + self.row * self.rows
    }

    fn height(rows: usize, row: i32) -> u32 {
        (10 + row * rows as i32 + 46) as u32
    }

    /// Grid lines, tick labels, axis title and row names.
    fn draw(&self, root: &Area<'_>, axis: &str, names: &[String]) -> DrawResult {
        let (step, values) = ticks(self.low, self.high, 5.0);
        for value in values {
            let x = self.x(value);
            root.draw(&PathElement::new([(x, self.top), (x, self.bottom())], GRID.stroke_width(1)))?;
            let style = text_style(12, INK, HPos::Center, VPos::Top);
            root.draw(&Text::new(tick_label(value, step), (x, self.bottom() + 5), style))?;
        }
        let middle = (self.left + self.right) / 2;
        let style = text_style(12, INK, HPos::Center, VPos::Top);
        root.draw(&Text::new(axis.to_owned(), (middle, self.bottom() + 23), style))?;
        for (row, name) in names.iter().enumerate() {
            let line = |text: &str, size, shift| {
                let style = text_style(size, INK, HPos::Right, VPos::Center);
                root.draw(&Text::new(short(text, 14), (self.left - 8, self.y(row) + shift), style))
            };
            // `workload · setting` takes two lines, or its second half would be cut off.
            match name.split_once(" · ") {
                None => line(name, 13, 0)?,
                Some((workload, setting)) => {
                    line(workload, 13, -7)?;
                    line(setting, 11, 8)?;
                }
            }
        }
        Ok(())
    }
}

/// Room above the largest value, so that labels and intervals do not touch the frame.
fn high_end(values: impl Iterator<Item = f64>, low: f64) -> f64 {
    let max = values.filter(|v| v.is_finite()).fold(low, f64::max);
    let span = (max - low).max(0.5);
    low + span * 1.08
}

/// Accept length per workload with its interval.
pub(super) fn accept_len(summaries: &[Summary]) -> Result<String, BenchError> {
    let title = "Accept length per workload";
    let shown: Vec<(&Summary, Estimate)> =
        summaries.iter().filter_map(|s| Some((s, s.accept_len?))).collect();
    let tops = shown.iter().map(|(_, e)| e.interval.map_or(e.value, |i| i.high.min(e.value * 1.8)));
    let description = shown
        .iter()
        .map(|(s, e)| format!("{}: {:.2} tokens per verify step from {} rows", s.name, e.value, e.rows))
        .collect::<Vec<_>>()
        .join("; ");
    let frame = RowFrame {
        left: 106,
        right: 346,
        top: 10,
        row: 34,
        rows: shown.len() as i32,
        low: 1.0,
        high: high_end(tops, 1.0),
    };
    svg(title, &description, RowFrame::height(shown.len(), 34), |root| {
        let names: Vec<String> = shown.iter().map(|(s, _)| s.name.clone()).collect();
        frame.draw(root, "tokens per verify step (1 = no gain)", &names)?;
        for (row, (summary, estimate)) in shown.iter().enumerate() {
            let y = frame.y(row);
            if let Some(i) = estimate.interval {
                let (a, b) = (frame.x(i.low.max(frame.low)), frame.x(i.high.min(frame.high)));
                root.draw(&PathElement::new([(a, y), (b, y)], SERIES[0].stroke_width(2)))?;
                for x in [a, b] {
                    root.draw(&PathElement::new([(x, y - 5), (x, y + 5)], SERIES[0].stroke_width(2)))?;
                }
            }
            let x = frame.x(estimate.value);
            if summary.is_total {
                let diamond = [(x - 7, y), (x, y - 7), (x + 7, y), (x, y + 7)];
                root.draw(&Polygon::new(diamond, SERIES[0].filled()))?;
            } else {
                root.draw(&Circle::new((x, y), 5, SERIES[0].filled()))?;
            }
            let style = text_style(13, INK, HPos::Left, VPos::Center);
            root.draw(&Text::new(format!("{:.2}", estimate.value), (frame.right + 10, y), style))?;
        }
        Ok(())
    })
}

/// Tokens per second, target-only against speculative, per workload.
pub(super) fn tokens_per_s(summaries: &[Summary]) -> Result<String, BenchError> {
    let title = "Decoding speed per workload";
    let shown: Vec<(&Summary, f64, f64)> = summaries
        .iter()
        .filter_map(|s| Some((s, s.plain_tokens_per_s?.value, s.spec_tokens_per_s?.value)))
        .collect();
    let description = shown
        .iter()
        .map(|(s, plain, spec)| {
            format!(
                "{}: {plain:.1} tokens per second target-only, {spec:.1} with the draft, {} rows",
                s.name, s.rows
            )
        })
        .collect::<Vec<_>>()
        .join("; ");
    let frame = RowFrame {
        left: 106,
        right: 346,
        top: 10,
        row: 46,
        rows: shown.len() as i32,
        low: 0.0,
        high: high_end(shown.iter().flat_map(|(_, a, b)| [*a, *b]), 0.0),
    };
    svg(title, &description, RowFrame::height(shown.len(), 46), |root| {
        let names: Vec<String> = shown.iter().map(|(s, ..)| s.name.clone()).collect();
        frame.draw(root, "tokens per second of decode time", &names)?;
        for (row, (_, plain, spec)) in shown.iter().enumerate() {
            let y = frame.y(row);
            let style = || text_style(12, INK, HPos::Left, VPos::Center);
            let plain_box = [(frame.left, y - 16), (frame.x(*plain), y - 3)];
            root.draw(&Rectangle::new(plain_box, PAPER.filled()))?;
            root.draw(&Rectangle::new(plain_box, PLAIN.stroke_width(1)))?;
            root.draw(&Text::new(format!("{plain:.1}"), (frame.x(*plain) + 5, y - 10), style()))?;
            let spec_box = [(frame.left, y + 1), (frame.x(*spec), y + 15)];
            root.draw(&Rectangle::new(spec_box, SERIES[0].filled()))?;
            root.draw(&Text::new(format!("{spec:.1}"), (frame.x(*spec) + 5, y + 8), style()))?;
        }
        Ok(())
    })
}

/// Accept length of the rows of each workload: every row a dot, the box from the 25th to the 75th percentile, the
/// bar across it the median.
pub(super) fn row_distribution(summaries: &[Summary]) -> Result<String, BenchError> {
    let title = "Accept length of single rows";
    let shown: Vec<&Summary> = summaries.iter().filter(|s| !s.row_accept_lens.is_empty()).collect();
    let description = shown
        .iter()
        .map(|s| {
            let at = |p| percentile(&s.row_accept_lens, p).unwrap_or(f64::NAN);
            format!(
                "{}: 10th percentile {:.2}, median {:.2}, 90th percentile {:.2}, {} rows",
                s.name,
                at(10.0),
                at(50.0),
                at(90.0),
                s.row_accept_lens.len()
            )
        })
        .collect::<Vec<_>>()
        .join("; ");
    let frame = RowFrame {
        left: 106,
        right: 388,
        top: 10,
        row: 44,
        rows: shown.len() as i32,
        low: 1.0,
        high: high_end(shown.iter().flat_map(|s| s.row_accept_lens.iter().copied()), 1.0),
    };
    svg(title, &description, RowFrame::height(shown.len(), 44), |root| {
        let names: Vec<String> = shown.iter().map(|s| s.name.clone()).collect();
        frame.draw(root, "tokens per verify step, one dot per row", &names)?;
        for (row, summary) in shown.iter().enumerate() {
            let y = frame.y(row);
            for (i, value) in summary.row_accept_lens.iter().enumerate() {
                // Spread by the golden ratio, so that equal values stay apart and the drawing never changes.
                let spread = ((i as f64 * 0.618_034).fract() - 0.5) * 24.0;
                let dot = SERIES[0].mix(0.45).filled();
                root.draw(&Circle::new((frame.x(*value), y + spread.round() as i32), 2, dot))?;
            }
            let at = |p| percentile(&summary.row_accept_lens, p).map(|v| frame.x(v));
            if let (Some(a), Some(m), Some(b)) = (at(25.0), at(50.0), at(75.0)) {
                root.draw(&Rectangle::new([(a, y - 14), (b, y + 14)], INK.stroke_width(1)))?;
                root.draw(&PathElement::new([(m, y - 17), (m, y + 17)], INK.stroke_width(3)))?;
            }
        }
        Ok(())
    })
}

/// Marker `i` of a series, around a point: circle, square, triangle, diamond, hollow circle, cross.
fn marker(root: &Area<'_>, i: usize, (x, y): (i32, i32)) -> DrawResult {
    let color = SERIES[i % SERIES_MAX];
    match i % SERIES_MAX {
        0 => root.draw(&Circle::new((x, y), 5, color.filled()))?,
        1 => root.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], color.filled()))?,
        2 => root.draw(&Polygon::new([(x, y - 6), (x + 6, y + 5), (x - 6, y + 5)], color.filled()))?,
        3 => root.draw(&Polygon::new([(x - 6, y), (x, y - 6), (x + 6, y), (x, y + 6)], color.filled()))?,
        4 => {
            root.draw(&Circle::new((x, y), 5, PAPER.filled()))?;
            root.draw(&Circle::new((x, y), 5, color.stroke_width(2)))?;
        }
        _ => {
            root.draw(&PathElement::new([(x - 5, y - 5), (x + 5, y + 5)], color.stroke_width(2)))?;
            root.draw(&PathElement::new([(x - 5, y + 5), (x + 5, y - 5)], color.stroke_width(2)))?;
        }
    }
    Ok(())
}

/// The marker of a series alone, for legends.
pub(super) fn legend_marker(i: usize) -> Result<String, BenchError> {
    let full = svg("", "", 20, |root| marker(root, i, (10, 10)))?;
    let inner = full.split_once("</desc>").map_or("", |(_, rest)| rest);
    Ok(format!("<svg viewBox=\"0 0 20 20\" class=\"marker\" aria-hidden=\"true\">{inner}"))
}

/// Frame of a chart with two linear axes.
struct Plane {
    x: (f64, f64),
    y: (f64, f64),
    height: i32,
}

impl Plane {
    const LEFT: i32 = 56;
    const RIGHT: i32 = 390;
    const TOP: i32 = 12;

    fn bottom(&self) -> i32 {
        self.height - 44
    }

    fn at(&self, x: f64, y: f64) -> (i32, i32) {
        let sx = (x - self.x.0) / (self.x.1 - self.x.0).max(1e-12);
        let sy = (y - self.y.0) / (self.y.1 - self.y.0).max(1e-12);
        (
            Self::LEFT + (sx * f64::from(Self::RIGHT - Self::LEFT)).round() as i32,
            self.bottom() - (sy * f64::from(self.bottom() - Self::TOP)).round() as i32,
        )
    }

    fn draw(
        &self,
        root: &Area<'_>,
        axes: (&str, &str),
        x_ticks: &[(f64, String)],
        y_ticks: &[(f64, String)],
    ) -> DrawResult {
        for (value, label) in y_ticks {
            let (_, y) = self.at(self.x.0, *value);
            root.draw(&PathElement::new([(Self::LEFT, y), (Self::RIGHT, y)], GRID.stroke_width(1)))?;
            let style = text_style(12, INK, HPos::Right, VPos::Center);
            root.draw(&Text::new(label.clone(), (Self::LEFT - 6, y), style))?;
        }
        for (value, label) in x_ticks {
            let (x, _) = self.at(*value, self.y.0);
            let style = text_style(12, INK, HPos::Center, VPos::Top);
            root.draw(&Text::new(label.clone(), (x, self.bottom() + 6), style))?;
        }
        let style = text_style(12, INK, HPos::Center, VPos::Top);
        let middle = (Self::LEFT + Self::RIGHT) / 2;
        root.draw(&Text::new(axes.0.to_owned(), (middle, self.bottom() + 24), style))?;
        let style = text_style(12, INK, HPos::Center, VPos::Top).transform(FontTransform::Rotate270);
        root.draw(&Text::new(axes.1.to_owned(), (2, (Self::TOP + self.bottom()) / 2), style))?;
        Ok(())
    }
}

/// Pixels between the labels of two depths.
const DEPTH_LABEL: usize = 24;

/// The depths whose labels find room: all of them, or the first and round ones.
fn depths_named(depth: usize) -> Vec<usize> {
    let width = (Plane::RIGHT - Plane::LEFT) as usize;
    let fits = |step: &usize| width * step >= DEPTH_LABEL * depth;
    let step = [1, 2, 5, 10, 20, 50].into_iter().find(fits).unwrap_or(100);
    let is_named = |d: &usize| match step {
        1 | 2 => d % step == 1 % step,
        _ => *d == 1 || d.is_multiple_of(step),
    };
    (1..=depth).filter(is_named).collect()
}

/// Accept rate at each depth, one line per workload (at most [`SERIES_MAX`]).
pub(super) fn accept_rate(summaries: &[&Summary]) -> Result<String, BenchError> {
    let title = "Accept rate at each depth";
    let depth = summaries.iter().map(|s| s.accept_rate_at.len()).max().unwrap_or(0).max(1);
    let description = summaries
        .iter()
        .map(|s| {
            let rates: Vec<String> =
                s.accept_rate_at.iter().map(|e| format!("{:.0} %", e.value * 100.0)).collect();
            format!("{}, {} rows, depth 1 to {}: {}", s.name, s.rows, rates.len(), rates.join(", "))
        })
        .collect::<Vec<_>>()
        .join("; ");
    let plane = Plane { x: (0.7, depth as f64 + 0.3), y: (0.0, 1.0), height: 290 };
    svg(title, &description, 290, |root| {
        let x_ticks: Vec<_> = depths_named(depth).into_iter().map(|d| (d as f64, d.to_string())).collect();
        let y_ticks: Vec<_> = (0..=5).map(|i| (f64::from(i) / 5.0, format!("{} %", i * 20))).collect();
        plane.draw(
            root,
            ("depth of the draft token in its proposal", "accepted / proposed"),
            &x_ticks,
            &y_ticks,
        )?;
        for (i, summary) in summaries.iter().enumerate() {
            let color = SERIES[i % SERIES_MAX];
            let points: Vec<_> = summary
                .accept_rate_at
                .iter()
                .enumerate()
                .map(|(d, e)| plane.at(d as f64 + 1.0, e.value))
                .collect();
            root.draw(&PathElement::new(points.clone(), color.stroke_width(2)))?;
            for (d, estimate) in summary.accept_rate_at.iter().enumerate() {
                if let Some(interval) = estimate.interval {
                    let (x, low) = plane.at(d as f64 + 1.0, interval.low);
                    let (_, high) = plane.at(d as f64 + 1.0, interval.high);
                    root.draw(&PathElement::new([(x, low), (x, high)], color.stroke_width(1)))?;
                    for y in [low, high] {
                        root.draw(&PathElement::new([(x - 4, y), (x + 4, y)], color.stroke_width(1)))?;
                    }
                }
            }
            for point in points {
                marker(root, i, point)?;
            }
        }
        Ok(())
    })
}

/// A training curve: one series over optimiser steps.
///
/// `series` chooses marker and colour, so that an estimated curve never looks like a measured one.
pub(super) fn training(
    title: &'static str,
    axis: &str,
    points: &[TrainingPoint],
    series: usize,
) -> Result<String, BenchError> {
    let description =
        points.iter().map(|p| format!("step {}: {:.2}", p.step, p.value)).collect::<Vec<_>>().join("; ");
    let steps = points.iter().map(|p| p.step as f64).fold(1.0, f64::max);
    let top = high_end(points.iter().map(|p| p.interval.map_or(p.value, |i| i.high)), 1.0);
    let plane = Plane { x: (0.0, steps * 1.03), y: (1.0, top), height: 250 };
    svg(title, &description, 250, |root| {
        let (step, values) = ticks(1.0, top, 4.0);
        let y_ticks: Vec<_> = values.into_iter().map(|v| (v, tick_label(v, step))).collect();
        let (step, values) = ticks(0.0, steps, 5.0);
        let x_ticks: Vec<_> = values.into_iter().map(|v| (v, tick_label(v, step))).collect();
        plane.draw(root, ("optimiser step", axis), &x_ticks, &y_ticks)?;
        let line: Vec<_> = points.iter().map(|p| plane.at(p.step as f64, p.value.max(1.0))).collect();
        root.draw(&PathElement::new(line.clone(), SERIES[series % SERIES_MAX].stroke_width(2)))?;
        for (point, at) in points.iter().zip(line) {
            if let Some(interval) = point.interval {
                let (x, low) = plane.at(point.step as f64, interval.low.max(1.0));
                let (_, high) = plane.at(point.step as f64, interval.high.max(1.0));
                root.draw(&PathElement::new(
                    [(x, low), (x, high)],
                    SERIES[series % SERIES_MAX].stroke_width(1),
                ))?;
            }
            if points.len() <= 40 {
                marker(root, series, at)?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_depths_never_touch() {
        for depth in 1..=64 {
            let named = depths_named(depth);
            let per_depth = f64::from(Plane::RIGHT - Plane::LEFT) / (depth as f64 - 0.4);
            for pair in named.windows(2) {
                let room = per_depth * (pair[1] - pair[0]) as f64;
                // Two digits of 12 pixels are about 14 wide.
                assert!(room >= 18.0, "depth {depth}: {pair:?} are {room:.0} pixels apart");
            }
            assert_eq!(named[0], 1);
        }
        assert_eq!(depths_named(5), [1, 2, 3, 4, 5]);
        assert_eq!(depths_named(16), [1, 3, 5, 7, 9, 11, 13, 15]);
    }
}
