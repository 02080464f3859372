import unittest

from harness import leaks

WATCHED = leaks.Watched("fds", "descriptors", 2)


def samples(values):
    return [{"fds": value} for value in values]


class JudgeTest(unittest.TestCase):
    def test_what_stays_and_what_swings_does_not_leak(self):
        self.assertFalse(leaks.judge(samples([9] * 100), WATCHED).leaks)
        self.assertFalse(leaks.judge(samples([9, 30] * 50 + [9]), WATCHED).leaks)

    def test_what_grows_by_more_than_the_limit_leaks(self):
        judged = leaks.judge(samples(range(100)), WATCHED)
        self.assertTrue(judged.leaks)
        self.assertEqual(judged.quarters, (20.5, 43.0, 65.5, 88.0))

    def test_growing_up_in_the_warm_up_is_no_leak(self):
        self.assertFalse(leaks.judge(samples([*range(10), *[50] * 90]), WATCHED).leaks)

    def test_the_limit_itself_is_allowed(self):
        self.assertFalse(leaks.judge(samples([5] * 60 + [7] * 40), WATCHED).leaks)
        self.assertTrue(leaks.judge(samples([5] * 60 + [8] * 40), WATCHED).leaks)

    def test_samples_without_the_figure_do_not_count_and_few_are_refused(self):
        self.assertFalse(leaks.judge(samples([None] * 50 + [3] * 40), WATCHED).leaks)
        with self.assertRaises(ValueError):
            leaks.judge(samples([None] * 50 + [3] * 8), WATCHED)


class GaugesTest(unittest.TestCase):
    PAGE = """# TYPE lodestream_leases gauge
# HELP lodestream_leases Leases held.
lodestream_leases 3
# TYPE lodestream_errors counter
lodestream_errors_total{code="internal"} 7
# TYPE lodestream_budget_bytes gauge
lodestream_budget_bytes{device="host"} 100
# TYPE lodestream_jobs gauge
lodestream_jobs{state="queued"} 0
# EOF
"""

    def test_counters_of_some_families_that_are_not_zero(self):
        page = 'a_total{x="1"} 2\na_total{x="2"} 0\nab_total{x="1"} 3\nb_total{x="1"} 4\n'
        self.assertEqual(leaks.counters(page, ["a_total", "b_total"]), {'a_total{x="1"}': 2.0, 'b_total{x="1"}': 4.0})

    def test_only_gauges_that_go_back_to_zero(self):
        self.assertEqual(leaks.gauges(self.PAGE), {"lodestream_leases": 3.0, 'lodestream_jobs{state="queued"}': 0.0})


class DefectsTest(unittest.TestCase):
    def test_leaks_gauges_and_what_was_found_on_the_way(self):
        judged = {"daemon": [leaks.judge(samples(range(100)), WATCHED)], "resident": []}
        found = leaks.defects({"defects": ["a byte"], "end": {"gauges": {"a": 0.0, "b": 1.0}}}, judged)
        self.assertEqual(found, ["a byte", "fds grew by 67.5", "b was 1 when nobody was there any more"])


if __name__ == "__main__":
    unittest.main()
