"""The same for asyncio."""

import asyncio
import unittest

from support import Case, large_model, some_model

from lodestream import aio


class Asynchronous(Case):
    def test_calls_wait_on_threads(self):
        path = self.root / "m.safetensors"
        contents = some_model(path)
        daemon = self.daemon()

        async def use():
            async with await aio.connect(daemon.socket) as node:
                models = await asyncio.gather(*(node.attach(path, framework="np") for _ in range(4)))
                for model in models:
                    self.assertEqual({name: model[name].tobytes() for name in model}, contents)
                self.assertEqual(len(await node.list()), 1)
                self.assertEqual(len((await node.resolve(path))["tensors"]), 4)
                job = await node.prefetch(path)
                self.assertEqual((await node.wait(job))["state"], "done")
                with self.refused("artifact.not_found"):
                    await node.stat("sha256:00")
            loaded = await aio.load(path, socket=daemon.socket, framework="np")
            self.assertEqual(len(loaded), 4)
            async with await aio.direct() as node:
                self.assertTrue(node.is_direct)
                self.assertEqual(len(await node.attach(path, framework="np")), 4)

        asyncio.run(use())

    def test_a_cancelled_task_ends_its_load(self):
        daemon = self.daemon("--pages", "4k")

        async def use(path):
            async with await aio.connect(daemon.socket) as node:
                loop, jobs = asyncio.get_running_loop(), []

                def cancel(job):
                    if not jobs:
                        jobs.append(job["job"])
                        loop.call_soon_threadsafe(task.cancel)

                task = asyncio.create_task(node.prefetch(path, progress=cancel))
                with self.assertRaises(asyncio.CancelledError):
                    await task
                return (await node.wait(jobs[0]))["state"]

        # A load may be faster than its cancellation; then the next one is tried.
        for attempt in range(8):
            if asyncio.run(use(large_model(self.root / f"{attempt}.safetensors"))) == "cancelled":
                return
            with daemon.connect() as node:
                node.evict(self.root / f"{attempt}.safetensors")
        self.fail("no load was ended")


if __name__ == "__main__":
    unittest.main()
