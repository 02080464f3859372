//! Rounds of contestants, and what their figures come to.

use std::hash::{BuildHasher, RandomState};

use serde::Serialize;

/// Median and spread of at least one value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    /// How many values there were.
    pub count: usize,
}

impl Summary {
    /// Of these values; `None` if there is none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Summary { median, least, most, count: values.len() })
    }
}

/// The figures of each contestant, by round.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Rounds {
    /// For each round: the figure of each contestant, if it ran.
    pub figures: Vec<Vec<Option<f64>>>,
}

impl Rounds {
    /// Runs `contestants` contestants `rounds` times, in another order each time. `run` gives a figure or why there is
    /// none; then the contestant does not run again.
    ///
    /// # Errors
    /// The first error that `run` says ends everything.
    pub fn run<E>(
        rounds: u32,
        contestants: usize,
        mut run: impl FnMut(u32, usize) -> Result<Option<f64>, E>,
    ) -> Result<Rounds, E> {
        let mut figures = Vec::new();
        let mut out = vec![false; contestants];
        for round in 0..rounds {
            let mut row = vec![None; contestants];
            for contestant in shuffled(contestants) {
                if !out[contestant] {
                    row[contestant] = run(round, contestant)?;
                    out[contestant] = row[contestant].is_none();
                }
            }
            figures.push(row);
        }
        Ok(Rounds { figures })
    }

    /// The figures of one contestant.
    pub fn of(&self, contestant: usize) -> Option<Summary> {
        Summary::of(self.figures.iter().filter_map(|row| row[contestant]))
    }

    /// One contestant's figures over those of another in the same round.
    pub fn ratio(&self, contestant: usize, reference: usize) -> Option<Summary> {
        Summary::of(self.figures.iter().filter_map(|row| Some(row[contestant]? / row[reference]?)))
    }

    /// One contestant's figures over the mean of all in the same round.
    pub fn to_mean(&self, contestant: usize) -> Option<Summary> {
        Summary::of(self.figures.iter().filter_map(|row| {
            let ran: Vec<f64> = row.iter().copied().flatten().collect();
            Some(row[contestant]? / (ran.iter().sum::<f64>() / ran.len() as f64))
        }))
    }
}

/// The numbers below `count` in an order of chance. Not for secrets: it only keeps one contestant from always following another.
fn shuffled(count: usize) -> Vec<usize> {
    let chance = RandomState::new();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_cached_key(|place| chance.hash_one(place));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_the_middle_and_the_ends() {
        let summary = Summary::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((summary.median, summary.least, summary.most, summary.count), (2.0, 1.0, 3.0, 3));
        assert_eq!(Summary::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn contestants_are_compared_within_their_round() {
        // The drive is half as fast in the second round: the ratio stays.
        let figures = [[10.0, 20.0], [5.0, 10.0]];
        let rounds =
            Rounds::run(2, 2, |round, contestant| Ok::<_, ()>(Some(figures[round as usize][contestant])))
                .unwrap();
        let ratio = rounds.ratio(0, 1).unwrap();
        assert_eq!((ratio.least, ratio.most), (0.5, 0.5));
        assert_eq!(rounds.to_mean(1).unwrap().median, 2.0 * 20.0 / 30.0);
        assert_eq!(rounds.of(0).unwrap().median, 7.5);
    }

    #[test]
    fn who_cannot_run_is_not_asked_again() {
        let mut asked = 0;
        let rounds = Rounds::run(3, 2, |_, contestant| {
            asked += u32::from(contestant == 0);
            Ok::<_, ()>((contestant == 1).then_some(1.0))
        });
        assert_eq!((asked, rounds.unwrap().of(0)), (1, None));
        assert_eq!(
            Rounds::run(3, 1, |round, _| if round == 1 { Err(round) } else { Ok(Some(1.0)) }).unwrap_err(),
            1
        );
    }

    #[test]
    fn every_contestant_is_in_every_order() {
        let mut order = shuffled(50);
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
