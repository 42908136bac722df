//! Line charts as SVG, in a file or as text. Texts in them are escaped.

use std::{fs, path::Path};

use anyhow::{Context as _, anyhow, ensure};
use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    prelude::*,
};

/// A line with its name.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// What a chart shows.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Whether equal steps along x are equal factors.
    pub(super) log_x: bool,
    /// Whether y starts at 0.
    pub(super) from_zero: bool,
}

/// Colours that also people with colour blindness tell apart (Okabe and Ito 2008), then darker ones.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(148, 0, 40),
    RGBColor(0, 70, 60),
    RGBColor(100, 70, 160),
    RGBColor(120, 100, 0),
    RGBColor(0, 0, 0),
];

/// A line of more points has no dots on them.
const DOTTED: usize = 60;

impl Chart<'_> {
    /// Draws the lines into a file.
    ///
    /// # Errors
    /// Nothing to draw; a file that cannot be written.
    pub(super) fn draw(&self, path: &Path, series: &[Series]) -> anyhow::Result<()> {
        let svg = self.svg(series).with_context(|| format!("draw {}", path.display()))?;
        fs::write(path, svg).with_context(|| format!("write {}", path.display()))
    }

    /// The lines as an SVG document.
    ///
    /// # Errors
    /// Nothing to draw.
    pub(super) fn svg(&self, series: &[Series]) -> anyhow::Result<String> {
        let points = || series.iter().flat_map(|s| &s.points).filter(|(x, y)| x.is_finite() && y.is_finite());
        ensure!(points().count() > 0, "nothing to draw in {:?}", self.title);
        let range = |of: fn(&(f64, f64)) -> f64| {
            points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
        };
        let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
        let space = ((y1 - y0) * 0.06).max(y1.abs() * 0.01).max(1e-6);
        let y = (if self.from_zero { 0.0 } else { y0 - space })..(y1 + space);
        if self.log_x {
            let x0 = x0.max(1e-9);
            self.lines(series, (x0 * 0.9..x1.max(x0) * 1.1).log_scale(), y)
        } else {
            let space = ((x1 - x0) * 0.02).max(1e-6);
            self.lines(series, x0 - space..x1 + space, y)
        }
    }

    fn lines<X>(&self, series: &[Series], x: X, y: std::ops::Range<f64>) -> anyhow::Result<String>
    where
        X: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
    {
        let failed = |e: &dyn std::fmt::Display| anyhow!("draw {:?}: {e}", self.title);
        let mut svg = String::new();
        let root = SVGBackend::with_string(&mut svg, (760, 420)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(x, y)
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .light_line_style(WHITE)
            .x_label_formatter(&short)
            .y_label_formatter(&short)
            .draw()
            .map_err(|e| failed(&e))?;
        for (s, colour) in series.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            let finite = || s.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            chart
                .draw_series(LineSeries::new(finite(), style))
                .map_err(|e| failed(&e))?
                .label(s.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
            if s.points.len() <= DOTTED {
                let dots = finite().map(|p| Circle::new(p, 3, colour.filled()));
                chart.draw_series(dots).map_err(|e| failed(&e))?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(|e| failed(&e))?;
        root.present().map_err(|e| failed(&e))?;
        // both borrow the text, which the backend ends when it goes
        drop((chart, root));
        Ok(svg)
    }
}

/// A number with as many digits as a reader needs.
fn short(v: &f64) -> String {
    match v.abs() {
        a if a >= 1e9 => format!("{:.1}G", v / 1e9),
        a if a >= 1e6 => format!("{:.1}M", v / 1e6),
        a if a >= 1e4 => format!("{:.0}k", v / 1e3),
        a if a >= 100.0 || *v == v.round() => format!("{v:.0}"),
        a if a >= 1.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_drawn_with_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.svg");
        let series = |name: &str, points: &[(f64, f64)]| Series { name: name.into(), points: points.to_vec() };
        let all = [series("one", &[(1.0, 0.5), (10.0, 0.75), (20.0, f64::NAN)]), series("two", &[(5.0, 0.6)])];
        for log_x in [false, true] {
            let chart = Chart { title: "Title", x: "steps", y: "accuracy", log_x, from_zero: false };
            chart.draw(&path, &all).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            for part in ["<svg", "Title", "steps", "accuracy", "one", "two", "<polyline", "</svg>"] {
                assert!(svg.contains(part), "{part}");
            }
            assert!(!svg.contains("NaN"));
            assert!(chart.draw(&path, &[series("none", &[])]).is_err());
            assert_eq!(chart.svg(&all).unwrap(), svg);
            let hostile = [series("<script>&", &[(1.0, 1.0)])];
            let svg = chart.svg(&hostile).unwrap();
            assert!(!svg.contains("<script") && svg.contains("&lt;script&gt;&amp;"));
        }
        let texts: Vec<String> = [2.5e6, 33_000.0, 128.0, 2.0, 1.25, 0.875].iter().map(short).collect();
        assert_eq!(texts, ["2.5M", "33k", "128", "2", "1.2", "0.88"]);
    }
}
