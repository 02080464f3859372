import unittest
import xml.dom.minidom

from versus import table

GIB = 1 << 30


def run(seconds, cpu_seconds=0.5):
    return {"seconds": seconds, "bytes": GIB, "cpu_seconds": cpu_seconds, "peak_rss_bytes": 100 << 20}


def second(*seconds):
    return dict(zip(table.TOUCHES, map(run, seconds)))


FIGURES = {
    "date": "2026-01-02", "command": "benches/versus/run", "machine": {"kernel": "6"}, "machine_changes": [],
    "holder_bytes": 0, "model_bytes": GIB, "pages": "thp", "fio": "s", "versions": ["# x", "torch==1"],
    "skipped": {"InstantTensor": "no CUDA"},
    "rounds": {
        # The second round's drive is twice as slow: ratios to fio must not see it.
        "cold, kept": [{"fio": {"seconds": 1.0, "bytes": GIB, "cpu_seconds": 0.1}, "A": run(2.0), "B": run(1.25)},
                       {"fio": {"seconds": 2.0, "bytes": GIB, "cpu_seconds": 0.1}, "A": run(4.0), "B": run(2.5)}],
        "cold, thrown": [], "warm": [{"A": run(0.5), "B": run(0.001)}],
        "second": [{"A": second(0.005, 0.1, 0.2), "B": second(0.001, 0.02, 0.15)}],
    },
}


class TableTest(unittest.TestCase):
    def test_rates_are_set_against_fio_of_the_same_round_and_the_fastest_comes_first(self):
        rows = list(table.cold_rows(FIGURES["rounds"]["cold, kept"]))
        self.assertEqual([row[0] for row in rows], ["fio", "B", "A"])
        self.assertEqual(rows[1][1], "0.800 (0.800–0.800)")
        self.assertEqual(rows[2][1], "0.500 (0.500–0.500)")
        self.assertEqual(rows[1][4], "0.500")
        self.assertEqual(rows[1][5], "100")

    def test_second_consumers_are_told_by_what_they_touch(self):
        self.assertEqual(list(table.second_rows(FIGURES["rounds"]["second"]))[0], ("B", "1.0", "20.0", "150.0"))

    def test_what_did_not_run_is_said_and_nothing_stands_for_it(self):
        text = table.markdown(FIGURES, "x.svg")
        self.assertIn("| InstantTensor | `no CUDA` |", text)
        self.assertNotIn("thrown away", text)
        self.assertIn("`torch==1`.", text)

    def test_the_picture_is_well_formed(self):
        document = xml.dom.minidom.parseString(table.plot(FIGURES))
        self.assertEqual(len(document.getElementsByTagName("rect")), 3)


if __name__ == "__main__":
    unittest.main()
