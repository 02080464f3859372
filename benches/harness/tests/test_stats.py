import unittest

from harness import stats


class SummaryTest(unittest.TestCase):
    def test_median_of_odd_and_even_counts(self):
        self.assertEqual(stats.summary([3.0, 1.0, 2.0]), stats.Summary(2.0, 1.0, 3.0, 3))
        self.assertEqual(stats.summary([4.0, 1.0, 2.0, 3.0]).median, 2.5)

    def test_one_outlier_does_not_move_the_median(self):
        self.assertEqual(stats.summary([1.0, 1.0, 1.0, 1.0, 100.0]).median, 1.0)

    def test_nothing_to_summarise_is_an_error(self):
        with self.assertRaises(ValueError):
            stats.summary([])

    def test_printed_form_has_median_and_range(self):
        self.assertEqual(str(stats.summary([0.9, 1.0, 0.95])), "0.950 (0.900–1.000)")


class PairedRatiosTest(unittest.TestCase):
    def test_a_drift_of_the_drive_cancels_out(self):
        # The drive halves its rate from round to round; the contestant always has 90 % of it.
        rounds = [{"fio": 2.0 / 2**n, "load": 1.8 / 2**n} for n in range(5)]
        for ratio in stats.paired_ratios(rounds, "load", "fio"):
            self.assertAlmostEqual(ratio, 0.9)

    def test_rounds_without_one_of_the_two_are_left_out(self):
        rounds = [{"fio": 2.0, "load": 1.0}, {"fio": 2.0}, {"load": 5.0}]
        self.assertEqual(stats.paired_ratios(rounds, "load", "fio"), [0.5])


if __name__ == "__main__":
    unittest.main()
