//! Several deltas, each on its own runs of rows: against separate ops, against each alone, and against central differences.

use super::*;
use candle_core::{Device, Var};

const ENDINGS: [(Option<Act>, bool); 4] =
    [(None, false), (None, true), (Some(Act::Silu), false), (Some(Act::Silu), true)];

/// Numbers that follow from a seed.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    fn tensor(&mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let numbers: Vec<f32> = (0..shape.elem_count()).map(|_| self.next() as f32 / 2f32.powi(31) - 0.5).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    fn var(&mut self, shape: impl Into<Shape>) -> Var {
        Var::from_tensor(&self.tensor(shape)).unwrap()
    }
}

/// What a delta has: pairs and biases by columns.
struct Own {
    rows: Vec<Range<usize>>,
    lows: Vec<(Range<usize>, Var, Var, f64)>,
    biases: Vec<(Range<usize>, Var)>,
}

impl Own {
    /// Of a delta with columns in two parts; some have no pair, no bias, or neither.
    fn draw(draw: &mut Draw, k: usize, parts: &[Range<usize>; 2], rows: Vec<Range<usize>>) -> Self {
        let (mut lows, mut biases) = (Vec::new(), Vec::new());
        for columns in parts {
            for _ in 0..draw.below(3) {
                let (rank, scale) = (1 + draw.below(9), 0.25 + draw.below(4) as f64);
                let pair = (draw.var((rank, k)), draw.var((rank, columns.len())));
                lows.push((columns.clone(), pair.0, pair.1, scale));
            }
            if draw.below(2) == 0 {
                biases.push((columns.clone(), draw.var(columns.len())));
            }
        }
        Self { rows, lows, biases }
    }

    fn updates<'a>(&'a self, rows: &'a [Range<usize>]) -> RowUpdates<'a> {
        let mut updates: Vec<Update<'a>> = Vec::new();
        let all = self.lows.iter().map(|(c, ..)| c).chain(self.biases.iter().map(|(c, _)| c));
        let mut columns: Vec<&Range<usize>> = all.collect();
        columns.sort_by_key(|c| c.start);
        columns.dedup();
        for columns in columns {
            let lows = self.lows.iter().filter(|(c, ..)| c == columns);
            let biases = self.biases.iter().filter(|(c, _)| c == columns);
            updates.push(Update {
                columns: columns.clone(),
                low: lows.map(|(_, a, b, scale)| (a.as_tensor(), b.as_tensor(), *scale)).collect(),
                bias: biases.map(|(_, b)| b.as_tensor()).collect(),
            });
        }
        RowUpdates { rows, updates }
    }

    fn vars(&self) -> Vec<&Var> {
        let lows = self.lows.iter().flat_map(|(_, a, b, _)| [a, b]);
        lows.chain(self.biases.iter().map(|(_, b)| b)).collect()
    }

    /// `y` `[rows of it, out]`, its part of the base's output, with its updates by separate ops.
    fn apply(&self, x: &Tensor, mut y: Tensor) -> Tensor {
        let n = y.dim(1).unwrap();
        let wide = |t: Tensor, c: &Range<usize>| t.pad_with_zeros(1, c.start, n - c.end).unwrap();
        for (columns, a, b, scale) in &self.lows {
            let update = (x.matmul(&a.t().unwrap()).unwrap().matmul(b).unwrap() * *scale).unwrap();
            y = (y + wide(update, columns)).unwrap();
        }
        for (columns, b) in &self.biases {
            y = y.broadcast_add(&wide(b.unsqueeze(0).unwrap(), columns)).unwrap();
        }
        y
    }
}

/// A linear in two parts, and deltas on runs of its rows.
struct Case {
    k: usize,
    n: usize,
    rows: usize,
    weight: Weight,
    dense: Tensor,
    own: Option<Tensor>,
    x: Var,
    residual: Var,
    /// Of the loss: what each output weighs.
    g: Tensor,
    deltas: Vec<Own>,
}

impl Case {
    /// Runs of 1 to `longest` rows, dealt to the deltas and to nobody, every delta's in one piece or anyhow.
    fn draw(seed: u64, deltas: usize, (k, n): (usize, usize), longest: usize) -> Self {
        let draw = &mut Draw(seed * 7919 + deltas as u64);
        let mut rows_of = vec![Vec::new(); deltas];
        let mut end = 0;
        let turns = seed.is_multiple_of(2);
        for turn in 0..if turns { 3 * deltas } else { deltas } {
            end += if draw.below(3) == 0 { draw.below(4) } else { 0 };
            let run = end..end + 1 + draw.below(longest);
            end = run.end;
            rows_of[if turns { draw.below(deltas) } else { turn }].push(run);
        }
        let rows = end + draw.below(3);
        let parts = [0..n / 3, n / 3..n];
        let deltas = rows_of.into_iter().map(|rows| Own::draw(draw, k, &parts, rows)).collect();
        let dense = draw.tensor((k, n));
        Self {
            k,
            n,
            rows,
            weight: Weight::from_in_out(&dense).unwrap(),
            dense,
            own: (draw.below(2) == 0).then(|| draw.tensor(n)),
            x: draw.var((rows, k)),
            residual: draw.var((rows, n)),
            g: draw.tensor((rows, n)),
            deltas,
        }
    }

    fn updates(&self) -> Vec<RowUpdates<'_>> {
        self.deltas.iter().map(|own| own.updates(&own.rows)).collect()
    }

    fn ending(&self, (act, residual): (Option<Act>, bool)) -> Ending<'_> {
        Ending { act, residual: residual.then_some(self.residual.as_tensor()) }
    }

    fn fused(&self, x: &Tensor, ending: (Option<Act>, bool)) -> Tensor {
        let updates = self.updates();
        assert!(takes_updates(x, &self.weight, self.own.as_ref(), &updates, self.ending(ending)));
        updated_linear(x, &self.weight, self.own.as_ref(), &updates, self.ending(ending)).unwrap()
    }

    /// An op for each delta's rows, product and sum.
    fn separate(&self, x: &Tensor, ending: (Option<Act>, bool)) -> Tensor {
        let mut y = super::super::linear(x, &self.weight, self.own.as_ref()).unwrap();
        for own in &self.deltas {
            for rows in &own.rows {
                let piece = |t: &Tensor, rows: Range<usize>| t.narrow(0, rows.start, rows.len()).unwrap();
                let patched = own.apply(&piece(x, rows.clone()), piece(&y, rows.clone()));
                let pieces = [piece(&y, 0..rows.start), patched, piece(&y, rows.end..self.rows)];
                let pieces: Vec<&Tensor> = pieces.iter().filter(|t| t.elem_count() > 0).collect();
                y = Tensor::cat(&pieces, 0).unwrap();
            }
        }
        self.ending(ending).apply(y).unwrap()
    }

    fn grads(&self, y: &Tensor) -> candle_core::backprop::GradStore {
        (y * &self.g).unwrap().sum_all().unwrap().backward().unwrap()
    }

    fn vars(&self) -> Vec<&Var> {
        self.deltas.iter().flat_map(Own::vars).collect()
    }
}

fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Within `1e-4` of the largest of what is wanted.
#[track_caller]
fn assert_near(got: &Tensor, want: &Tensor, what: &str) {
    let (got, want) = (numbers(got), numbers(want));
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(1f32, |most, v| most.max(v.abs()));
    let apart = got.iter().zip(&want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(apart < 1e-4 * most, "{what}: {apart} of {most}");
}

#[test]
fn outputs_and_all_gradients_are_those_of_separate_ops() {
    for seed in 0..6 {
        // with long runs the parts are shared out over threads
        for (deltas, shape, longest) in [(1, (17, 21), 9), (2, (40, 66), 20), (5, (33, 48), 7), (5, (130, 200), 60)] {
            let case = Case::draw(seed, deltas, shape, longest);
            for ending in ENDINGS {
                let what = format!("seed {seed}, {deltas} deltas, {ending:?}");
                let (want, got) = (case.separate(&case.x, ending), case.fused(&case.x, ending));
                assert_near(&got, &want, &what);
                let (want, got) = (case.grads(&want), case.grads(&got));
                let residual = ending.1.then_some(&case.residual);
                for v in case.vars().into_iter().chain([&case.x]).chain(residual) {
                    match want.get(v) {
                        Some(want) => assert_near(got.get(v).expect("a gradient"), want, &what),
                        // a delta that was dealt no rows
                        None => assert!(got.get(v).is_none_or(|g| numbers(g).iter().all(|v| *v == 0.0))),
                    }
                }
                // an input that wants no gradient gets none, and the others' are the same
                let untracked = case.grads(&case.fused(&case.x.as_detached_tensor(), ending));
                assert!(untracked.get(&case.x).is_none());
                for v in case.vars() {
                    assert_eq!(untracked.get(v).map(numbers), got.get(v).map(numbers), "{what}");
                }
            }
        }
    }
}

/// Whatever lies beside them, a delta's rows give its tensors the gradients that they give them alone: the same bits.
#[test]
fn company_changes_no_bit_of_a_deltas_gradients() {
    for seed in 0..6 {
        for (deltas, shape) in [(2, (24, 70)), (5, (130, 200))] {
            let case = Case::draw(seed, deltas, shape, 50);
            let together = case.grads(&case.fused(&case.x, (None, false)));
            for own in case.deltas.iter().filter(|own| !own.rows.is_empty()) {
                let picked = |t: &Tensor| {
                    let pieces = own.rows.iter().map(|rows| t.narrow(0, rows.start, rows.len()).unwrap());
                    Tensor::cat(&pieces.collect::<Vec<_>>(), 0).unwrap()
                };
                let x = picked(&case.x.as_detached_tensor());
                let all = 0..x.dim(0).unwrap();
                let updates = [own.updates(std::slice::from_ref(&all))];
                let bias = case.own.as_ref();
                let y = updated_linear(&x, &case.weight, bias, &updates, Ending::default()).unwrap();
                let alone = (y * picked(&case.g)).map(|y| y.sum_all().unwrap().backward().unwrap());
                // without anything trained there is no graph
                let alone = alone.unwrap();
                for (_, a, b, _) in &own.lows {
                    for v in [a, b] {
                        let (got, want) = (together.get(v).unwrap(), alone.get(v).unwrap());
                        assert_eq!(numbers(got), numbers(want), "seed {seed}, {deltas} deltas");
                    }
                }
                // rows of a bias are summed in runs, which several runs of rows divide otherwise
                for (_, b) in &own.biases {
                    let (got, want) = (together.get(b).unwrap(), alone.get(b).unwrap());
                    match own.rows.len() {
                        1 => assert_eq!(numbers(got), numbers(want), "seed {seed}, {deltas} deltas"),
                        _ => assert_near(got, want, "a bias"),
                    }
                }
            }
        }
    }
}

/// Rows that are no delta's are those of the linear, with its ending, bit for bit.
#[test]
fn rows_of_nobody_are_left_as_they_are() {
    let mut left = 0;
    for seed in 0..6 {
        let case = Case::draw(seed, 5, (40, 66), 6);
        for ending in ENDINGS {
            let got = case.fused(&case.x, ending);
            let bare = updated_linear(&case.x, &case.weight, case.own.as_ref(), &[], case.ending(ending)).unwrap();
            let (got, bare) = (got.to_vec2::<f32>().unwrap(), bare.to_vec2::<f32>().unwrap());
            let owned = |row: usize| case.deltas.iter().any(|own| own.rows.iter().any(|rows| rows.contains(&row)));
            for row in (0..case.rows).filter(|row| !owned(*row)) {
                assert_eq!(got[row], bare[row], "seed {seed}, row {row}, {ending:?}");
                left += 1;
            }
        }
    }
    assert!(left > 20, "{left}");
}

/// Rows that are given as several runs, one after the other, are one run.
#[test]
fn adjacent_runs_are_one() {
    let mut compared = 0;
    for seed in 0..5 {
        let case = Case::draw(seed, 1, (40, 66), 30);
        let (rows, all) = (case.rows, 0..case.rows);
        let single: Vec<Range<usize>> = (0..rows).map(|row| row..row + 1).collect();
        let of = |runs: &[Range<usize>]| {
            let updates = [case.deltas[0].updates(runs)];
            let y = updated_linear(&case.x, &case.weight, case.own.as_ref(), &updates, Ending::default()).unwrap();
            let grads = case.grads(&y);
            let vars = case.vars().into_iter().chain([&case.x]).map(|v| numbers(grads.get(v).unwrap()));
            (numbers(&y), vars.collect::<Vec<_>>())
        };
        assert_eq!(of(&single), of(std::slice::from_ref(&all)), "seed {seed}");
        compared += case.vars().len();
    }
    assert!(compared > 5, "{compared}");
}

/// The loss in f64, by plain sums: `values` are those of `x`, of the residual and of [`Case::vars`].
fn loss(case: &Case, values: &[Vec<f64>], (act, residual): (Option<Act>, bool)) -> f64 {
    let wide = |t: &Tensor| numbers(t).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (k, n) = (case.k, case.n);
    let (w, g) = (wide(&case.dense), wide(&case.g));
    let mut y = vec![0f64; case.rows * n];
    for (row, y) in y.chunks_exact_mut(n).enumerate() {
        let x = &values[0][row * k..(row + 1) * k];
        for (j, y) in y.iter_mut().enumerate() {
            *y = x.iter().enumerate().map(|(i, x)| x * w[i * n + j]).sum();
        }
        if let Some(own) = &case.own {
            y.iter_mut().zip(wide(own)).for_each(|(y, b)| *y += b);
        }
        let mut next = values[2..].iter();
        for own in &case.deltas {
            let has = own.rows.iter().any(|rows| rows.contains(&row));
            for (columns, a, _, scale) in &own.lows {
                let (rank, a, b) = (a.dim(0).unwrap(), next.next().unwrap(), next.next().unwrap());
                for r in (0..rank).filter(|_| has) {
                    let low: f64 = x.iter().zip(&a[r * k..]).map(|(x, a)| x * a).sum();
                    let b = &b[r * columns.len()..(r + 1) * columns.len()];
                    y[columns.clone()].iter_mut().zip(b).for_each(|(y, b)| *y += scale * low * b);
                }
            }
            for (columns, _) in &own.biases {
                let b = next.next().unwrap();
                if has {
                    y[columns.clone()].iter_mut().zip(b).for_each(|(y, b)| *y += b);
                }
            }
        }
    }
    let ended = y.iter().zip(&values[1]).map(|(y, r)| {
        let y = if act.is_some() { y / (1.0 + (-y).exp()) } else { *y };
        if residual { y + r } else { y }
    });
    ended.zip(g).map(|(y, g)| y * g).sum()
}

#[test]
fn gradients_are_central_differences_in_f64() {
    for seed in 0..4 {
        for deltas in [1, 2, 5] {
            let case = Case::draw(seed, deltas, (7, 9), 4);
            for ending in ENDINGS {
                let grads = case.grads(&case.fused(&case.x, ending));
                let vars: Vec<&Var> = [&case.x, &case.residual].into_iter().chain(case.vars()).collect();
                let at: Vec<Vec<f64>> = vars.iter().map(|v| numbers(v).into_iter().map(f64::from).collect()).collect();
                for (i, v) in vars.iter().enumerate() {
                    let got = grads.get(v).map_or_else(|| vec![0f32; at[i].len()], numbers);
                    for p in (0..got.len()).step_by(1 + got.len() / 5) {
                        let moved = |h: f64| {
                            let mut all = at.clone();
                            all[i][p] += h;
                            loss(&case, &all, ending)
                        };
                        let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                        let apart = (f64::from(got[p]) - slope).abs();
                        assert!(apart < 1e-4 * slope.abs().max(1.0), "seed {seed}, {deltas}, {ending:?}, {i}: {apart}");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_that_do_not_fit_are_an_error() {
    let draw = &mut Draw(3);
    let weight = Weight::from_in_out(&draw.tensor((6, 8))).unwrap();
    let (x, a, b) = (draw.var((10, 6)), draw.var((2, 6)), draw.var((2, 8)));
    let of = |first: &[Range<usize>], second: &[Range<usize>]| {
        let update = Update { columns: 0..8, low: vec![(a.as_tensor(), b.as_tensor(), 1.0)], bias: vec![] };
        let updates = [first, second].map(|rows| RowUpdates { rows, updates: vec![update.clone()] });
        updated_linear(&x, &weight, None, &updates, Ending::default()).map(|_| ()).map_err(|e| e.to_string())
    };
    let (first, rest) = (0..4, 4..10);
    let one = std::slice::from_ref;
    assert_eq!(of(one(&first), one(&rest)), Ok(()));
    assert_eq!(of(&[0..4, 5..6], &[7..10, 4..5]), Ok(()));
    assert!(of(one(&first), &[8..9, 3..5]).unwrap_err().contains("rows 3..5"));
    assert!(of(&[0..4, 2..3], one(&rest)).unwrap_err().contains("rows 2..3"));
    assert!(of(one(&first), &[5..6, 9..11]).unwrap_err().contains("rows 9..11"));
}
