"""The line that shows how far a load is."""

import unittest

from lodestream._progress import Shown, line


class Line(unittest.TestCase):
    def job(self, **more):
        return {"artifact": "/models/llama/", "bytes": 1 << 30, "total": 4 << 30, "rate": 2.0**29, "elapsed_ms": 2000, **more}

    def test_it_says_how_far_how_long_and_what_the_time_goes_to(self):
        text = line(self.job(eta_ms=66_000, bottleneck="storage"))
        self.assertEqual(
            text, "llama:  25%|██████                  | 1.00/4.00 GiB [00:02<01:06, 0.50 GiB/s, storage]")

    def test_before_anything_is_known(self):
        text = line(self.job(bytes=0, total=0, rate=0.0, elapsed_ms=0))
        self.assertIn("  0%|                        | 0.00/0.00 GiB [00:00<?, 0.00 GiB/s]", text)

    def test_a_function_is_called_and_no_is_no(self):
        seen = []
        with Shown(seen.append) as show:
            show({"job": 1})
        self.assertEqual(seen, [{"job": 1}])
        with Shown(False) as show:
            self.assertIsNone(show)


if __name__ == "__main__":
    unittest.main()
