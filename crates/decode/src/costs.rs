//! What passes cost: as measured before decoding, and as the steps since then say.
//!
//! Measured costs ([`Costs`]) are a curve over the rows of a pass. A [`Ledger`] corrects it from the times of real
//! steps: how much slower all passes have become lately (the load of the machine, longer contexts), and by how much
//! passes of about so many rows differ from the curve (the curve was measured under another load). Both change what
//! is drafted, never the text.

use std::collections::VecDeque;

/// Costs of an engine in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    /// Target passes: pairs of rows and time, by rows ascending, the first for one row.
    pub verify_ms: Vec<(usize, f32)>,
    /// One more draft step of one row; 0 without a draft.
    pub draft_step_ms: f32,
    /// Taking the features of one step into the draft, and its first proposals; 0 without a draft.
    pub extend_ms: f32,
    /// What each further row adds to a draft step.
    pub draft_row_ms: f32,
    /// What each further sequence adds to taking in.
    pub extend_row_ms: f32,
    /// Taking in a position that had to wait, among many.
    pub read_row_ms: f32,
}

/// A row costs at least this share of what a row of the largest measured pass takes on average: the memory that a
/// small pass waits for hides most of a row's work, never all of it.
const LEAST_SHARE: f32 = 0.05;

impl Costs {
    /// Time of a pass of `rows`, interpolated between measured sizes and extended past the last.
    pub(crate) fn verify(&self, rows: usize) -> f32 {
        let points = &self.verify_ms;
        let at = points.partition_point(|(r, _)| *r < rows);
        match (points.get(at.wrapping_sub(1)), points.get(at)) {
            (_, Some((r, ms))) if *r == rows => *ms,
            (Some((r0, t0)), Some((r1, t1))) => t0 + (t1 - t0) * (rows - r0) as f32 / (r1 - r0) as f32,
            (Some((r1, t1)), None) => t1 + self.slope_beyond() * (rows - r1) as f32,
            (None, Some((r, ms))) => ms * rows as f32 / *r as f32,
            (None, None) => 0.0,
        }
    }

    /// Price of a row past the largest measured pass. What the last two sizes say, unless that is next to nothing:
    /// large passes are bound by the work per row, so noise is the likelier reason.
    fn slope_beyond(&self) -> f32 {
        let points = &self.verify_ms;
        let slope = |a: (usize, f32), b: (usize, f32)| (b.1 - a.1) / (b.0 - a.0).max(1) as f32;
        let Some(&last) = points.last() else { return 0.0 };
        if points.len() == 1 {
            return last.1 / last.0.max(1) as f32;
        }
        let chord = slope(points[0], last);
        slope(points[points.len() - 2], last).max(0.5 * chord).max(self.least_slope())
    }

    /// The least that a further row can cost.
    fn least_slope(&self) -> f32 {
        self.verify_ms.last().map_or(0.0, |(rows, ms)| LEAST_SHARE * ms / (*rows).max(1) as f32)
    }

    /// The smallest price of a row beyond `rows`, averaged up to any of the measured sizes.
    pub(crate) fn cheapest_row(&self, rows: usize) -> f32 {
        let now = self.verify(rows);
        let more = |r: usize| (self.verify(r) - now).max(0.0) / (r - rows) as f32;
        let sizes = self.verify_ms.iter().map(|(r, _)| *r).filter(|r| *r > rows);
        sizes.map(more).fold(more(rows + 1), f32::min)
    }

    /// Time of a draft step of `rows`.
    pub(crate) fn draft_pass(&self, rows: usize) -> f32 {
        if rows == 0 { 0.0 } else { self.draft_step_ms + self.draft_row_ms * (rows - 1) as f32 }
    }

    /// Time of taking in and of first proposals for so many sequences.
    pub(crate) fn root_pass(&self, sequences: usize) -> f32 {
        if sequences == 0 { 0.0 } else { self.extend_ms + self.extend_row_ms * (sequences - 1) as f32 }
    }

    /// The same without what can only be noise. Whatever disturbs a pass makes it longer, so a size takes at most
    /// what a larger one took; and every row costs something.
    pub(crate) fn sound(mut self) -> Costs {
        let mut least = f32::INFINITY;
        for (_, ms) in self.verify_ms.iter_mut().rev() {
            least = least.min(*ms);
            *ms = least;
        }
        let slope = self.least_slope();
        for i in 1..self.verify_ms.len() {
            let (rows, ms) = self.verify_ms[i - 1];
            let (r, t) = &mut self.verify_ms[i];
            *t = t.max(ms + slope * (*r - rows) as f32);
        }
        self
    }
}

/// Measured costs, and how far the measurement can be trusted.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The costs.
    pub costs: Costs,
    /// How far the passes of one size lay apart: the middle one above the fastest, as a share of it, averaged over the
    /// sizes. A few hundredths on an idle machine.
    pub spread: f32,
    /// Passes that were timed.
    pub passes: usize,
}

/// Kept costs that the steps contradict.
#[derive(Clone, Debug, PartialEq)]
pub struct CostsOff {
    /// Rows of the passes that show it.
    pub rows: usize,
    /// What such a pass should take in milliseconds. Of a pass that is off against passes of another size: measured by
    /// what those take now.
    pub expected_ms: f32,
    /// What it takes.
    pub found_ms: f32,
}

/// Rows that are looked at together: up to these. Larger passes are not learnt from.
const BUCKETS: [usize; 14] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];
/// Latest values that a median is taken of.
const WINDOW: usize = 31;
/// Values from which on a median counts.
const ENOUGH: usize = 3;
/// What a pass shows is put down to the load of the machine by steps of at most so much (a logarithm),
const DRIFT_STEP: f32 = 0.015;
/// which are the same for all that is further from the middle than this: disturbed passes are far above it, and undisturbed ones
/// never as far below, so steps by distance would lead upwards.
const DRIFT_NEAR: f32 = 0.05;
/// The load has changed at once where the middle one of so many passes in a row shows more than this.
const JUMP_PASSES: usize = 5;
const JUMP: f32 = 0.12;
/// Octaves of rows over which what was seen of one size speaks for another, down to 1/e.
const REACH: f32 = 0.5;
/// Passes after which what was seen of a size counts 1/e, and what its neighbours show the more: load and size are told apart
/// only where several sizes are seen, and what is not seen any more must not be held against what is.
const FORGET: f32 = 256.0;
/// Sizes that disagree among each other by this factor refute a curve,
const OFF_SHAPE: f32 = 1.35;
/// and so does a machine that is faster than it seemed by this one: it was busy when it was measured.
const OFF_SCALE: f32 = 1.35;

/// The latest values, and the middle of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent(VecDeque<f32>);

/// The same, and at which pass the last one came.
#[derive(Clone, Debug, Default)]
struct Seen {
    recent: Recent,
    at: u64,
}

impl Seen {
    fn push(&mut self, value: f32, now: u64) {
        // What is forgotten does not come back with a new value.
        let (len, fresh) = (self.recent.0.len(), self.fresh(now));
        if fresh < 0.5 {
            self.recent.0.drain(..len - (len as f32 * fresh) as usize);
        }
        self.recent.push(value);
        self.at = now;
    }

    /// How much of it still counts.
    fn fresh(&self, now: u64) -> f32 {
        (-(now.saturating_sub(self.at) as f32) / FORGET).exp()
    }
}

impl Recent {
    pub(crate) fn push(&mut self, value: f32) {
        if self.0.len() == WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    /// `None` before there are enough.
    pub(crate) fn median(&self) -> Option<f32> {
        if self.0.len() < ENOUGH {
            return None;
        }
        let mut sorted: Vec<f32> = self.0.iter().copied().collect();
        sorted.sort_by(f32::total_cmp);
        Some(sorted[sorted.len() / 2])
    }

    fn is_full(&self) -> bool {
        self.0.len() == WINDOW
    }
}

/// What real steps say about measured costs. Times are kept as logarithms of their ratio to the measured ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    /// Change that all passes share, by the latest ones.
    drift: f32,
    /// What the latest passes showed beside it.
    latest: Vec<f32>,
    /// Passes so far.
    passes: u64,
    /// Per bucket what is left.
    buckets: [Seen; BUCKETS.len()],
    draft_step: Seen,
    extend: Seen,
    told: bool,
}

fn bucket(rows: usize) -> Option<usize> {
    let at = BUCKETS.partition_point(|b| *b < rows);
    (rows > 0 && at < BUCKETS.len()).then_some(at)
}

/// Logarithm of a ratio of two times; `None` if one of them is nothing.
fn log_ratio(found: f32, expected: f32) -> Option<f32> {
    (found > 0.0 && expected > 0.0).then(|| (found / expected).ln()).filter(|x| x.is_finite())
}

impl Ledger {
    /// A pass of `rows` took `ms`. Tells once if the measured costs are off.
    pub(crate) fn pass(&mut self, measured: &Costs, rows: usize, ms: f32) -> Option<CostsOff> {
        let at = bucket(rows)?;
        let found = log_ratio(ms, measured.verify(rows))?;
        // Passes of one size change together with the machine. How sizes differ among each other does not.
        if let Some(own) = self.buckets[at].recent.median() {
            self.change(found - self.drift - own);
        }
        self.passes += 1;
        self.buckets[at].push(found - self.drift, self.passes);
        if self.told {
            return None;
        }
        let off = self.off(measured);
        self.told = off.is_some();
        off
    }

    /// A pass took longer than such passes did, by this logarithm.
    fn change(&mut self, by: f32) {
        self.latest.push(by);
        if self.latest.len() == JUMP_PASSES {
            let mut sorted = self.latest.clone();
            sorted.sort_by(f32::total_cmp);
            let middle = sorted[JUMP_PASSES / 2];
            if middle.abs() > JUMP {
                self.drift += middle;
                self.latest.clear();
                return;
            }
            self.latest.remove(0);
        }
        self.drift += DRIFT_STEP * (by / DRIFT_NEAR).clamp(-1.0, 1.0);
    }

    /// Draft steps took so long each.
    pub(crate) fn draft_step(&mut self, measured: &Costs, ms: f32) {
        if let Some(found) = log_ratio(ms, measured.draft_step_ms) {
            self.draft_step.push(found - self.drift, self.passes);
        }
    }

    /// Taking in the features of a step, and the draft's first proposals after it, took so long.
    pub(crate) fn extend(&mut self, measured: &Costs, ms: f32) {
        if let Some(found) = log_ratio(ms, measured.extend_ms) {
            self.extend.push(found - self.drift, self.passes);
        }
    }

    /// Buckets of which enough is known, and what they say, each with a part of what its neighbours say.
    fn known(&self) -> Vec<(usize, f32)> {
        let medians: Vec<(usize, f32, f32)> = BUCKETS
            .iter()
            .zip(&self.buckets)
            .filter_map(|(rows, seen)| {
                let weight = seen.recent.0.len() as f32 * seen.fresh(self.passes);
                Some((*rows, seen.recent.median()?, weight))
            })
            .collect();
        let near = |rows: usize| {
            let (mut sum, mut weights) = (0.0, 0.0);
            for (other, says, values) in &medians {
                let octaves = (rows as f32 / *other as f32).log2().abs();
                let weight = values * (-octaves / REACH).exp();
                sum += weight * says;
                weights += weight;
            }
            // Of the latest passes some size is always known, and fresh.
            sum / weights
        };
        medians.iter().map(|(rows, ..)| (*rows, near(*rows))).collect()
    }

    fn off(&self, measured: &Costs) -> Option<CostsOff> {
        let full: Vec<(usize, f32)> = BUCKETS
            .iter()
            .zip(&self.buckets)
            .filter(|(_, seen)| seen.recent.is_full() && self.passes - seen.at < FORGET as u64)
            .filter_map(|(rows, seen)| Some((*rows, seen.recent.median()?)))
            .collect();
        let first = full.first()?;
        let told = |rows: usize, expected: f32, found: f32| {
            let ms = measured.verify(rows);
            Some(CostsOff { rows, expected_ms: ms * expected.exp(), found_ms: ms * found.exp() })
        };
        let apart =
            |a: &&(usize, f32), b: &&(usize, f32)| (a.1 - first.1).abs().total_cmp(&(b.1 - first.1).abs());
        let worst = full.iter().max_by(apart)?;
        if (worst.1 - first.1).abs() > OFF_SHAPE.ln() {
            return told(worst.0, self.drift + first.1, self.drift + worst.1);
        }
        // Slower says only that the machine is busy now.
        (self.drift + first.1 < -OFF_SCALE.ln()).then(|| told(first.0, 0.0, self.drift + first.1)).flatten()
    }

    /// The measured costs as the steps correct them.
    pub(crate) fn corrected(&self, measured: &Costs) -> Costs {
        let known = self.known();
        if known.is_empty() {
            return measured.clone();
        }
        // Between known sizes by the logarithm of the rows, past them as the nearest.
        let shape = |rows: usize| -> f32 {
            let at = known.partition_point(|(r, _)| *r < rows);
            match (known.get(at.wrapping_sub(1)), known.get(at)) {
                (Some((r0, s0)), Some((r1, s1))) => {
                    let x = (rows as f32 / *r0 as f32).ln() / (*r1 as f32 / *r0 as f32).ln();
                    s0 + (s1 - s0) * x
                }
                (_, Some((_, s))) | (Some((_, s)), None) => *s,
                (None, None) => 0.0,
            }
        };
        let mut sizes: Vec<usize> = measured.verify_ms.iter().map(|(rows, _)| *rows).collect();
        sizes.extend(known.iter().map(|(rows, _)| *rows));
        sizes.sort_unstable();
        sizes.dedup();
        let mut verify_ms: Vec<(usize, f32)> = sizes
            .into_iter()
            .map(|rows| (rows, measured.verify(rows) * (self.drift + shape(rows)).exp()))
            .collect();
        // Sizes that contradict each other: halfway between what the smaller and what the larger ones allow.
        let mut most = 0.0f32;
        let above: Vec<f32> = verify_ms
            .iter()
            .map(|(_, ms)| {
                most = most.max(*ms);
                most
            })
            .collect();
        let mut least = f32::INFINITY;
        for ((_, ms), above) in verify_ms.iter_mut().zip(above).rev() {
            least = least.min(*ms);
            *ms = (least + above) / 2.0;
        }
        let own = |seen: &Seen| {
            let (all, fresh) = (shape(1), seen.fresh(self.passes));
            (self.drift + seen.recent.median().map_or(all, |own| fresh * own + (1.0 - fresh) * all)).exp()
        };
        let (step, extend) = (own(&self.draft_step), own(&self.extend));
        Costs {
            verify_ms,
            draft_step_ms: measured.draft_step_ms * step,
            draft_row_ms: measured.draft_row_ms * step,
            extend_ms: measured.extend_ms * extend,
            extend_row_ms: measured.extend_row_ms * extend,
            read_row_ms: measured.read_row_ms * extend,
        }
        .sound()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(verify: &[(usize, f32)]) -> Costs {
        Costs { verify_ms: verify.to_vec(), draft_step_ms: 1.0, extend_ms: 1.0, ..Costs::default() }
    }

    #[test]
    fn costs_are_interpolated_and_extended() {
        let costs = costs(&[(1, 4.0), (2, 5.0), (4, 6.0)]);
        assert_eq!([1, 2, 3, 4, 6].map(|m| costs.verify(m)), [4.0, 5.0, 5.5, 6.0, 7.0]);
    }

    #[test]
    fn no_row_is_ever_free() {
        // The second size floored to the first, as a slow target on a busy machine was measured.
        for points in
            [&[(1, 45.0), (2, 45.0)][..], &[(1, 45.0)], &[(1, 45.0), (2, 44.0), (4, 45.0), (16, 45.0)]]
        {
            let costs = costs(points).sound();
            for rows in 1..64 {
                assert!(costs.verify(rows + 1) - costs.verify(rows) > 0.1, "{points:?}: row {rows}");
                assert!(costs.cheapest_row(rows) > 0.1, "{points:?}: row {rows}");
            }
        }
        // The last two sizes alike by chance: what all of them say holds.
        let costs = costs(&[(1, 45.0), (2, 46.0), (4, 48.0), (8, 100.0), (16, 100.0)]).sound();
        assert!(costs.verify(32) - costs.verify(16) > 16.0 * 0.5 * 55.0 / 15.0 * 0.99);
    }

    #[test]
    fn a_disturbed_small_pass_is_bounded_by_a_larger_one() {
        let costs = costs(&[(1, 90.0), (2, 46.0), (4, 47.0), (8, 58.0), (16, 104.0)]).sound();
        assert!(costs.verify(1) <= 46.0 && costs.verify(16) == 104.0, "{costs:?}");
    }

    /// Steps on a machine whose passes take what `real` says, in turns of these rows.
    fn steps(
        ledger: &mut Ledger,
        measured: &Costs,
        real: impl Fn(usize) -> f32,
        rows: &[usize],
        count: usize,
    ) -> usize {
        let turns = rows.iter().cycle().take(count);
        turns.filter(|rows| ledger.pass(measured, **rows, real(**rows)).is_some()).count()
    }

    #[test]
    fn wrong_costs_are_corrected_by_steps() {
        let real = costs(&[(1, 45.0), (2, 45.3), (4, 46.0), (8, 57.0), (16, 103.0), (32, 190.0)]);
        // Measured on a busy machine: the small passes were held up.
        let wrong = costs(&[(1, 90.0), (2, 90.0), (4, 91.0), (8, 92.0), (16, 104.0)]).sound();
        let mut ledger = Ledger::default();
        assert_eq!(ledger.corrected(&wrong), wrong);
        let told = steps(&mut ledger, &wrong, |rows| real.verify(rows), &[1, 3, 8, 16], 200);
        assert_eq!(told, 1, "said once");
        let found = ledger.corrected(&wrong);
        for rows in [1, 3, 8, 16] {
            let (found, real) = (found.verify(rows), real.verify(rows));
            assert!((found / real - 1.0).abs() < 0.1, "{rows} rows: {found} for {real}");
        }
    }

    #[test]
    fn load_is_told_from_shape() {
        let real = costs(&[(1, 45.0), (2, 45.3), (4, 46.0), (8, 57.0), (16, 103.0)]).sound();
        let mut ledger = Ledger::default();
        assert_eq!(steps(&mut ledger, &real, |rows| real.verify(rows), &[1, 4, 16], 60), 0);
        // A neighbour comes; only passes of 4 rows are seen from now on. A single one that is held up says little.
        ledger.pass(&real, 4, 400.0);
        assert!(ledger.corrected(&real).verify(1) < 45.0 * 1.1);
        assert_eq!(steps(&mut ledger, &real, |rows| 1.6 * real.verify(rows), &[4], 40), 0, "busy is not off");
        let found = ledger.corrected(&real);
        for rows in [1, 4, 16] {
            let ratio = found.verify(rows) / (1.6 * real.verify(rows));
            assert!((0.9..1.1).contains(&ratio), "{rows} rows: {ratio}");
        }
        assert!((found.draft_step_ms / 1.6 - 1.0).abs() < 0.1, "{found:?}");
    }

    #[test]
    fn what_is_not_seen_any_more_keeps_its_place_beside_what_is() {
        let real = costs(&[(1, 5.0), (2, 5.5), (4, 6.5), (8, 10.0)]).sound();
        let mut ledger = Ledger::default();
        // A shared machine: one pass in four is held up, by as much as its time.
        let mut random = 7u32;
        let mut held_up = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = (random >> 8) as f32 / (1 << 24) as f32;
            if x < 0.25 { 1.0 + 4.0 * x } else { 1.0 + 0.1 * x }
        };
        for pass in 0..10_000 {
            // All sizes at first, later none but one and two rows, then one.
            let rows = match pass {
                0..200 => [1, 2, 4, 8][pass % 4],
                200..2_000 => [1, 2][pass % 2],
                _ => 1,
            };
            ledger.pass(&real, rows, real.verify(rows) * held_up());
            if rows > 1 {
                ledger.draft_step(&real, held_up());
            }
            if pass % 100 == 99 {
                let found = ledger.corrected(&real);
                for rows in [2, 4, 8] {
                    let ratio = found.verify(rows) / found.verify(1) / (real.verify(rows) / real.verify(1));
                    assert!((0.75..1.35).contains(&ratio), "pass {pass}, {rows} rows: {ratio}, {found:?}");
                }
                let step = found.draft_step_ms / (found.verify(1) / real.verify(1));
                assert!((0.7..1.4).contains(&step), "pass {pass}: a draft step {step}");
            }
        }
    }

    #[test]
    fn costs_of_a_busy_machine_are_refuted_by_a_calm_one() {
        let busy = costs(&[(1, 90.0), (2, 91.0), (4, 92.0), (8, 114.0), (16, 206.0)]);
        let mut ledger = Ledger::default();
        let mut told = None;
        for _ in 0..40 {
            told = told.or(ledger.pass(&busy, 1, 45.0));
        }
        let told = told.expect("half of what it was");
        assert_eq!((told.rows, told.expected_ms), (1, 90.0));
        assert!((told.found_ms - 45.0).abs() < 1.0, "{told:?}");
    }
}
