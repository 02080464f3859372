"""The processes of benches/soak: `soak_client.py ACT SOCKET SEED MODEL…`, each through the wheel of the environment it runs in.

The last line of the output is a JSON object: bytes verified, refusals by code, and what else an act has to say. A byte that is
wrong, an error without a code and a code that nothing here explains end the process with a traceback.
"""
import asyncio
import collections
import concurrent.futures
import ctypes
import gc
import json
import os
import pathlib
import random
import resource
import struct
import sys
import time

import numpy

import lodestream
from lodestream import aio
from lodestream.safetensors import safe_open

FILE = "model.safetensors"
TENSORS = [f"layer.{number}.weight" for number in range(5)]
COLUMNS = 1024
TENSOR_BYTES = 4 << 20
# What a call may be refused with while artifacts and the daemon come and go. Anything else is a defect.
EXPECTED = frozenset({
    "artifact.leased", "artifact.not_resident", "client.connect", "client.disconnected", "daemon.draining",
    "job.cancelled", "source.file.changed", "tier.host.over_budget",
})
# How often an act tries to get what it needs, and how long it waits in between.
TRIES_MAX = 600
TRY_SECONDS = 0.1
# Share of one core that the long-lived process takes.
RESIDENT_SHARE = 0.04


def content(seed, number):
    """The bytes of a tensor of one writing, as uint8 of shape (TENSOR_BYTES,)."""
    return numpy.frombuffer(numpy.random.Generator(numpy.random.SFC64([seed, number])).bytes(TENSOR_BYTES), numpy.uint8)


def write(directory, seed):
    """A model whose metadata says which writing it is, in place of the one before, in one step."""
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    header = {"__metadata__": {"seed": str(seed)}}
    for number, name in enumerate(TENSORS):
        header[name] = {"dtype": "F32", "shape": [TENSOR_BYTES // 4 // COLUMNS, COLUMNS],
                        "data_offsets": [number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "next", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number in range(len(TENSORS)):
            file.write(content(seed, number))
        os.fsync(file.fileno())
        # Not only from memory: what is loaded next comes from the drive.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.replace(directory / "next", directory / FILE)


def seed_on_drive(directory):
    with open(directory / FILE, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        return int(json.loads(file.read(length))["__metadata__"]["seed"])


class Client:
    """What all acts share: the socket, the models, choices that a seed repeats, and the count of what was seen."""

    def __init__(self, socket, seed, models):
        self.socket = socket
        self.choose = random.Random(seed)
        self.models = [pathlib.Path(model) for model in models]
        self.codes = collections.Counter()
        self.verified = 0

    def say(self, **more):
        print(json.dumps({"verified_bytes": self.verified, "codes": self.codes, **more}), flush=True)

    def model(self):
        return self.choose.choice(self.models)

    def expected(self, error):
        """Counts a refusal; raises it again if nothing explains it."""
        if error.code not in EXPECTED:
            raise error
        self.codes[error.code] += 1

    def tried(self, call):
        """What a call gives once it is not refused; raises the last refusal when that takes too long."""
        for attempt in range(TRIES_MAX):
            try:
                return call()
            except lodestream.LodestreamError as error:
                self.expected(error)
                # Not kept for later: an exception keeps the frames of its callers, and their arrays, until the collector
                # runs; and the daemon the memory that they map.
                if attempt == TRIES_MAX - 1:
                    raise
            time.sleep(TRY_SECONDS)

    def connect(self):
        return self.tried(lambda: lodestream.connect(self.socket))

    def attach(self, node, select=None, **options):
        """A model of which nothing is older than what lay on the drive before it was asked for."""

        def once():
            # Another one each time: processes that wait for room must not all hold what the others wait for.
            directory = self.model()
            return seed_on_drive(directory), node.attach(directory, select, False, framework="np", **options)

        before, model = self.tried(once)
        assert int(model.metadata["seed"]) >= before, f"STALE: seed {model.metadata['seed']}, {before} was on the drive"
        return model

    def verify(self, model, names=None):
        """Each tensor has the bytes of the writing that the metadata names, and of no other."""
        seed = int(model.metadata["seed"])
        for name in names or list(model):
            self.same(model[name], seed, name)

    def same(self, tensor, seed, name, part=slice(None)):
        wanted = content(seed, TENSORS.index(name)).reshape(-1, COLUMNS * 4)[part]
        assert tensor.size and numpy.array_equal(tensor.view(numpy.uint8).reshape(wanted.shape), wanted), \
            f"WRONG BYTES in {name} of seed {seed}"
        self.verified += wanted.size


def read(client):
    """Attaches, compares every byte, lets go; an array outlives its model."""
    with client.connect() as node:
        model = client.attach(node)
        client.verify(model)
        array, seed = model[TENSORS[0]], int(model.metadata["seed"])
        model.close()
        del model
    client.same(array, seed, TENSORS[0])


def fork(client):
    """A child is refused on its parent's connection and reads on; the parent notices nothing."""
    with client.connect() as node:
        model = client.attach(node)
        child = os.fork()
        if child == 0:
            os._exit(forked(client, node, model))
        assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
        client.codes["client.forked"] += 2
        client.verify(model)
        client.tried(node.status)


def forked(client, node, model):
    try:
        for call in (node.status, lambda: node.attach(client.models[0], progress=False)):
            try:
                call()
            except lodestream.LodestreamError as error:
                assert error.code == "client.forked", error
            else:
                raise AssertionError("a forked child uses its parent's connection")
        client.verify(model)
        own = client.connect()
        client.verify(client.attach(own), TENSORS[:1])
        return 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def leave(client):
    """Ends without a word to anyone, with arrays in use."""
    model = client.attach(client.connect())
    client.verify(model, TENSORS[:2])
    client.say()
    os._exit(7)


def segfault(client):
    """Ends by SIGSEGV, with arrays in use."""
    model = client.attach(client.connect())
    client.verify(model, TENSORS[:2])
    client.say()
    ctypes.string_at(0)


def killed(client):
    """Attaches and reads on until somebody ends it."""
    node = client.connect()
    while True:
        client.verify(client.attach(node), [client.choose.choice(TENSORS)])
        time.sleep(TRY_SECONDS)


def slices(client):
    """Through the drop-in: parts of tensors before and after a whole one made the file resident."""
    os.environ["LODESTREAM_SOCKET"] = client.socket
    with safe_open(client.model() / FILE, framework="np") as file:
        seed = int(file.metadata()["seed"])
        for name in client.choose.sample(TENSORS, 3):
            first = client.choose.randrange(1000)
            part = slice(first, first + client.choose.randrange(1, 24))
            client.same(file.get_slice(name)[part], seed, name, part)
            client.same(file.get_tensor(name), seed, name)


def tasks(client):
    """asyncio: attaches side by side, and one that is cancelled."""

    async def attach(node):
        for _ in range(TRIES_MAX):
            directory = client.model()
            try:
                return await node.attach(directory, progress=False, framework="np")
            except lodestream.LodestreamError as error:
                client.expected(error)
                await asyncio.sleep(TRY_SECONDS)
        raise TimeoutError("no attach")

    async def act():
        async with aio.Node(client.connect()) as node:
            given_up = asyncio.ensure_future(attach(node))
            await asyncio.sleep(client.choose.random() / 100)
            given_up.cancel()
            # Two at a time: more models than two may not fit beside what others hold.
            for model in await asyncio.gather(attach(node), attach(node)):
                client.verify(model, client.choose.sample(TENSORS, 2))
            await asyncio.gather(given_up, return_exceptions=True)

    asyncio.run(act())


def hold(client):
    """Attached before the daemon is restarted, and read after it; then attached anew through the same node."""
    node = client.connect()
    model = client.attach(node)
    client.verify(model)
    print("holding", flush=True)
    sys.stdin.readline()
    client.verify(model)
    again = client.attach(node)
    client.verify(again)
    model.close()
    client.verify(again, TENSORS[:1])


def resident(client):
    """Attaches and lets go for as long as its input is open, in every way of the others that does not end a process."""
    os.environ["LODESTREAM_SOCKET"] = client.socket
    node, rounds, begin = client.connect(), 0, time.monotonic()
    baseline = len(os.listdir("/proc/self/fd"))

    def attach():
        client.verify(client.attach(node), [client.choose.choice(TENSORS)])

    def selection():
        name = client.choose.choice(TENSORS)
        client.verify(client.attach(node, [name]), [name])

    def part():
        half = {"name": TENSORS[1], "dim": 0, "of": 2, "index": 1}
        model = client.attach(node, half)
        rows = TENSOR_BYTES // 4 // COLUMNS
        client.same(model[TENSORS[1]], int(model.metadata["seed"]), TENSORS[1], slice(rows // 2, rows))

    def threads():
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for model in pool.map(lambda _: client.attach(node), range(2)):
                client.verify(model, TENSORS[2:3])

    def ask():
        client.tried(node.status)
        client.tried(node.list)
        client.tried(lambda: node.resolve(client.models[0]))

    def evict():
        try:
            node.evict(client.model())
        except lodestream.LodestreamError as error:
            client.expected(error)

    def missing():
        try:
            client.tried(lambda: node.attach(client.models[0] / "absent", progress=False))
        except lodestream.LodestreamError as error:
            assert error.code == "source.file.not_found", error
            client.codes[error.code] += 1

    def anew():
        nonlocal node
        node.close()
        node = client.connect()

    acts = [attach, attach, attach, selection, part, threads, ask, evict, missing, anew,
            lambda: slices(client), lambda: tasks(client), lambda: read(client)]
    os.set_blocking(0, False)
    while sys.stdin.buffer.raw.read(1) is None:
        client.choose.choice(acts)()
        rounds += 1
        # A pace, not a wait for anything: what is left of the core is for others.
        time.sleep(max(TRY_SECONDS, time.process_time() / RESIDENT_SHARE - (time.monotonic() - begin)))
    node.close()
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    client.say(rounds=rounds, regions_mapped=mapped, fds_more=len(os.listdir("/proc/self/fd")) - baseline)


ACTS = {"read": read, "fork": fork, "exit": leave, "killed": killed, "segfault": segfault, "slices": slices,
        "asyncio": tasks, "hold": hold, "resident": resident}


def main():
    # Segmentation faults are part of the run.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    act, *arguments = sys.argv[1:]
    if act == "write":
        write(arguments[0], int(arguments[1]))
        return
    socket, seed, *models = arguments
    client = Client(socket, int(seed), models)
    ACTS[act](client)
    if act != "resident":
        client.say()


if __name__ == "__main__":
    main()
