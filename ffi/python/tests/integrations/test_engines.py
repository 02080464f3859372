"""The plugins for inference engines beside the engines' own source, which is read, not run.

LODESTREAM_TEST_ENGINES is a directory that holds the packages `vllm` and `sglang`.
"""

import ast
import os
import pathlib
import unittest

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "lodestream"
ENGINES = pathlib.Path(os.environ["LODESTREAM_TEST_ENGINES"])


def parsed(path):
    return ast.parse(path.read_text(), str(path))


def module_of(name):
    """The source of an engine's module."""
    path = ENGINES.joinpath(*name.split("."))
    return parsed(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def names_of(tree):
    """What a module has at its top."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update({alias.asname or alias.name: node for alias in node.names})
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
    return names


def imported(tree, engine):
    """(module, name) of all that a plugin takes from an engine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == engine:
            yield from ((node.module, alias.name) for alias in node.names)


def methods_of(tree):
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def parameters(function):
    """Names of what it takes by position, and of what by name only."""
    arguments = function.args
    return [a.arg for a in arguments.posonlyargs + arguments.args], [a.arg for a in arguments.kwonlyargs]


def positional(function):
    return parameters(function)[0]


def attributes_of(tree, name):
    """What is asked of a variable."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def fields_of(tree):
    return {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}


class Engine:
    engine = None
    loader_base = "DefaultModelLoader"

    def setUp(self):
        self.plugin = parsed(PACKAGE / self.engine / "__init__.py")
        self.loader_module = parsed(PACKAGE / self.engine / "loader.py")
        self.loader = names_of(self.loader_module)["Loader"]
        [module] = {module for module, name in imported(self.loader_module, self.engine) if name == self.loader_base}
        self.base_module = module_of(module)
        self.base = names_of(self.base_module)[self.loader_base]

    def test_what_is_imported_is_there(self):
        for tree in (self.plugin, self.loader_module):
            for module, name in imported(tree, self.engine):
                self.assertIn(name, names_of(module_of(module)), f"{module}.{name}")

    def test_the_loader_is_a_model_loader(self):
        self.assertEqual([base.id for base in self.loader.bases], [self.loader_base])
        self.assertIn("BaseModelLoader", [base.id for base in self.base.bases])

    def test_overridden_methods_take_the_same_parameters(self):
        base = methods_of(self.base)
        for name, method in methods_of(self.loader).items():
            self.assertIn(name, base)
            self.assertEqual(parameters(method), parameters(base[name]), name)

    def test_methods_that_are_called_take_what_is_given_and_give_what_is_taken(self):
        base = methods_of(self.base)
        seen = set()
        for node in ast.walk(self.loader):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            call = node.value.func
            if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "self":
                seen.add(call.attr)
                given = [argument.attr for argument in node.value.args]
                given = ["model_name_or_path" if name == "model_or_path" else name for name in given]
                self.assertEqual(given, positional(base[call.attr])[1:])
                self.assertEqual(len(base[call.attr].returns.slice.elts), len(node.targets[0].elts), "values")
        self.assertEqual(seen, {"_prepare_weights"})

    def test_functions_that_are_called_take_as_much_as_is_given(self):
        modules = {name: module for module, name in imported(self.loader_module, self.engine)}
        for node in ast.walk(self.loader):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in modules:
                function = names_of(module_of(modules[node.func.id]))[node.func.id]
                self.assertEqual(len(node.args), len(positional(function)), node.func.id)

    def test_what_is_asked_of_sources_and_of_the_loader_is_there(self):
        classes = {node.name: node for node in ast.walk(self.base) if isinstance(node, ast.ClassDef)}
        self.assertTrue(attributes_of(self.loader, "source"))
        self.assertEqual(attributes_of(self.loader, "source") - fields_of(classes["Source"]), set())
        if attributes_of(self.loader, "resolved_source"):
            self.assertEqual(
                attributes_of(self.loader, "resolved_source") - fields_of(classes["ResolvedSource"]), set()
            )
        own = attributes_of(self.loader, "self") - {"load_config"}
        self.assertEqual(own - fields_of(self.base) - set(methods_of(self.base)), set())

    def test_the_entry_point_group_is_the_engines(self):
        project = (PACKAGE.parent / "pyproject.toml").read_text()
        group = self.group(module_of(f"{self.engine}{self.plugins}"))
        self.assertIn(f'[project.entry-points."{group}"]\nlodestream = "lodestream.{self.engine}:register"', project)
        self.assertEqual(parameters(names_of(self.plugin)["register"]), ([], []))


class Vllm(Engine, unittest.TestCase):
    engine = "vllm"
    plugins = ".plugins"

    def group(self, tree):
        return names_of(tree)["DEFAULT_PLUGINS_GROUP"].value

    def test_a_loader_is_registered_by_its_format(self):
        register = names_of(module_of("vllm.model_executor.model_loader"))["register_model_loader"]
        self.assertEqual(positional(register), ["load_format"])
        self.assertIn("load_format", fields_of(names_of(module_of("vllm.config.load"))["LoadConfig"]))

    def test_the_format_that_the_default_loader_is_given_is_one_of_its_own(self):
        formats = {
            node.value for node in ast.walk(methods_of(self.base)["_prepare_weights"]) if isinstance(node, ast.Constant)
        }
        self.assertIn("safetensors", formats)

    def test_what_the_base_class_asks_for_is_implemented(self):
        abstract = names_of(module_of("vllm.model_executor.model_loader.base_loader"))["BaseModelLoader"]
        for name in ("download_model", "load_weights"):
            self.assertIn(name, methods_of(abstract))
            self.assertEqual(parameters(methods_of(self.base)[name]), parameters(methods_of(abstract)[name]))


class Sglang(Engine, unittest.TestCase):
    engine = "sglang"
    plugins = ".srt.plugins"

    def group(self, tree):
        return names_of(tree)["GENERAL_PLUGINS_GROUP"].value

    def test_the_hook_is_on_a_method_with_its_parameters(self):
        [target] = [
            node.value for node in ast.walk(self.plugin) if isinstance(node, ast.Constant) and "_verify" in str(node.value)
        ]
        module, kind, method = target.rsplit(".", 2)
        hooked = methods_of(names_of(module_of(module))[kind])[method]
        ours = names_of(self.plugin)[method]
        self.assertEqual(len(positional(ours)), 1 + len(positional(hooked)), "the original, and what it is called with")

    def test_hooks_are_registered_as_the_registry_takes_them(self):
        registry = names_of(module_of("sglang.srt.plugins.hook_registry"))
        register = methods_of(registry["HookRegistry"])["register"]
        self.assertEqual(positional(register), ["cls", "target", "hook", "hook_type"])
        self.assertIn("AROUND", {target.id for node in registry["HookType"].body if isinstance(node, ast.Assign) for target in node.targets})

    def test_a_class_in_the_place_of_a_format_is_the_loader(self):
        source = ast.unparse(names_of(self.base_module)["get_model_loader"])
        self.assertIn("isinstance(load_config.load_format, type)", source)
        verify = ast.unparse(names_of(module_of("sglang.srt.configs.load_config"))["LoadConfig"])
        self.assertIn("if not isinstance(self.load_format, str):\n            return", verify)

    def test_the_format_that_the_default_loader_is_given_is_one_of_its_own(self):
        self.assertIn("LoadFormat.SAFETENSORS", ast.unparse(methods_of(self.base)["_prepare_weights"]))


if __name__ == "__main__":
    unittest.main()
