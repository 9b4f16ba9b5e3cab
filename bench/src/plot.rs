//! `performance.svg`: the figures that matter most, as bars.
//!
//! Each bar is the median of the rounds, the line on it reaches from the least to the greatest. Of
//! emulated hosts, the short line across a bar is what theory says.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::samples::{Samples, Spread};
use crate::setups::Kind;
use crate::{bulk, clients, hosts};

type Error = Box<dyn std::error::Error>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const KINDS: [(Kind, &str, RGBColor); 4] = [
    (Kind::Local, "local-only", RGBColor(0x9a, 0x9a, 0x9a)),
    (
        Kind::Stock,
        "stock, ANY 2 of 3 pg_receivewal",
        RGBColor(0xd9, 0x8a, 0x3d),
    ),
    (
        Kind::OursFromFiles,
        "safekeepers, after the local flush",
        RGBColor(0x8f, 0xb8, 0xde),
    ),
    (Kind::Ours, "safekeepers", RGBColor(0x2b, 0x6c, 0xb0)),
];

const FONT: &str = "sans-serif";
/// What plotters calls 16 comes out as 13 pixels.
const TEXT: i32 = 16;
const SMALL_TEXT: i32 = 14;

/// Bars by groups; in each group one for each kind.
struct Chart<'a> {
    title: &'a str,
    part: &'a str,
    points: Vec<String>,
    value: &'a str,
    /// A mark across each bar.
    theory: Option<&'a str>,
    decimals: usize,
}

pub fn write(out: &Path, samples: &Samples) {
    let path = out.join("performance.svg");
    draw(&path, samples).unwrap_or_else(|e| panic!("could not draw {}: {e}", path.display()));
}

fn draw(path: &Path, samples: &Samples) -> Result<(), Error> {
    let one_client = |point: &String| point.ends_with(", 1");
    let hosts: Vec<_> = samples
        .points(hosts::PART)
        .into_iter()
        .filter(one_client)
        .collect();
    let chart = |title, part, value, theory, decimals| Chart {
        title,
        part,
        points: samples.points(part),
        value,
        theory,
        decimals,
    };
    let charts = [
        chart(
            "one machine: transactions per second, by clients",
            clients::PART,
            "tps",
            None,
            0,
        ),
        chart(
            "one machine: CPU seconds per 10,000 commits, by clients",
            clients::PART,
            "cpu_s_per_10k",
            None,
            1,
        ),
        chart(
            "one machine: COPY, MB/s of WAL",
            bulk::PART,
            "wal_mb_per_s",
            None,
            0,
        ),
        Chart {
            points: hosts,
            ..chart(
                "emulated hosts, 1 client: mean latency in ms, and the formula's (F_primary / RTT / F_member)",
                hosts::PART,
                "mean_ms",
                Some("formula_ms"),
                2,
            )
        },
    ];
    let root = SVGBackend::new(path, (1000, 760)).into_drawing_area();
    root.fill(&WHITE)?;
    let (legend, rest) = root.split_vertically(36);
    draw_legend(&legend, samples)?;
    let (above, below) = rest.split_vertically(362);
    let (above_left, above_right) = above.split_horizontally(500);
    let (below_left, below_right) = below.split_horizontally(230);
    for (area, chart) in [above_left, above_right, below_left, below_right]
        .iter()
        .zip(&charts)
    {
        draw_chart(area, chart, samples)?;
    }
    root.present()?;
    Ok(())
}

fn measured(samples: &Samples, kind: Kind) -> bool {
    let parts = [clients::PART, bulk::PART, hosts::PART];
    parts.iter().any(|part| samples.has(part, kind))
}

fn draw_legend(area: &Area, samples: &Samples) -> Result<(), Error> {
    let mut x = 20;
    for (_, name, color) in KINDS.iter().filter(|(kind, ..)| measured(samples, *kind)) {
        area.draw(&Rectangle::new([(x, 14), (x + 14, 28)], color.filled()))?;
        area.draw(&Text::new(*name, (x + 20, 14), (FONT, TEXT)))?;
        x += 50 + 8 * i32::try_from(name.len())?;
    }
    Ok(())
}

fn draw_chart(area: &Area, chart: &Chart, samples: &Samples) -> Result<(), Error> {
    let spread = |point: &str, kind| samples.spread(chart.part, point, kind, chart.value);
    let kinds: Vec<_> = KINDS
        .iter()
        .filter(|(kind, ..)| samples.has(chart.part, *kind))
        .collect();
    let all = chart.points.iter().flat_map(|point| {
        kinds
            .iter()
            .filter_map(move |(kind, ..)| spread(point, *kind))
    });
    let highest = all.map(|spread| spread.max).fold(0.0, f64::max);
    if highest == 0.0 {
        return Ok(());
    }
    let mut context = ChartBuilder::on(area)
        .caption(chart.title, (FONT, TEXT))
        .margin(12)
        .x_label_area_size(24)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..chart.points.len() as f64, 0.0..highest * 1.12)?;
    context
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(6)
        .y_label_formatter(&|value| value.to_string())
        .light_line_style(WHITE)
        .label_style((FONT, SMALL_TEXT))
        .draw()?;
    let plot = context.plotting_area();
    let centered = |size: i32, vertical| {
        TextStyle::from((FONT, size).into_font()).pos(Pos::new(HPos::Center, vertical))
    };
    let width = 0.84 / kinds.len() as f64;
    for (group, point) in chart.points.iter().enumerate() {
        let label = point.strip_suffix(" ms, 1").unwrap_or(point).to_owned();
        let below = Text::new(label, (0, 6), centered(SMALL_TEXT, VPos::Top));
        plot.draw(&(EmptyElement::at((group as f64 + 0.5, 0.0)) + below))?;
        for (i, (kind, _, color)) in kinds.iter().enumerate() {
            let Some(Spread { median, min, max }) = spread(point, *kind) else {
                continue;
            };
            let left = group as f64 + 0.08 + width * i as f64;
            let (right, middle) = (left + width * 0.9, left + width * 0.45);
            plot.draw(&Rectangle::new(
                [(left, 0.0), (right, median)],
                color.filled(),
            ))?;
            plot.draw(&PathElement::new(
                [(middle, min), (middle, max)],
                BLACK.mix(0.6),
            ))?;
            let theory = chart
                .theory
                .and_then(|value| samples.spread(chart.part, point, *kind, value));
            if let Some(theory) = theory {
                let across = [
                    (left - width * 0.04, theory.median),
                    (right + width * 0.04, theory.median),
                ];
                plot.draw(&PathElement::new(across, BLACK.stroke_width(2)))?;
            }
            let text = format!("{median:.*}", chart.decimals);
            let above = Text::new(text, (0, -3), centered(SMALL_TEXT, VPos::Bottom));
            plot.draw(&(EmptyElement::at((middle, max)) + above))?;
        }
    }
    Ok(())
}
