import unittest

from harness import report

GIB = 1 << 30


def run(cpu_seconds, **more):
    return {"bytes": 2 * GIB, "seconds": 1.0, "cpu_seconds": cpu_seconds, "path": {"direct": 3 * GIB, "staged": GIB},
            "phases": {"wait": 1.0}, "pool_fill_cpu_seconds": None, "own_idle_bytes": 10 << 20,
            "own_after_bytes": 20 << 20, "staging_bytes": 32 << 20, "reader": "io_uring", **more}


FIGURES = {
    "date": "2026-01-02", "command": "benches/load", "version": "lodestream 0", "rounds": [{}], "model_bytes": GIB,
    "cold_by": "drop_caches", "holder_bytes": 0, "machine": {"kernel": "6"}, "machine_changes": [],
    "fio": {"setting": "s", "median_gb_per_s": 2.0}, "attach_ms": {"8 GB": {"total": [1.0, 3.0, 2.0]}},
    "skipped": {"thp, in line": "refused"},
    "loads": {"hugetlb, ready pool": [run(0.2, pool_fill_cpu_seconds=0.5)], "thp, in line": []},
    "ratios": {"hugetlb, ready pool": [0.9], "thp, in line": []},
}


class MarkdownTest(unittest.TestCase):
    def test_cpu_is_per_gib_and_paths_are_shares(self):
        text = report.markdown(FIGURES)
        self.assertIn("| hugetlb, ready pool | 0.900 (0.900–0.900) | 0.100 (0.100–0.100) | 0.250 "
                      "| direct 75.0 %, staged 25.0 % | io_uring |", text)

    def test_what_was_not_measured_is_said_and_has_no_row_of_figures(self):
        text = report.markdown(FIGURES)
        self.assertIn("| thp, in line | refused |", text)
        self.assertEqual(text.count("thp, in line"), 1)

    def test_attach_has_median_and_most(self):
        self.assertIn("| 8 GB | total | 2.00 | 3.00 |", report.markdown(FIGURES))


if __name__ == "__main__":
    unittest.main()
