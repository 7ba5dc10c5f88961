"""The module over the program, with the tiny target of the repository: no network, half a minute.

`python -m unittest discover -s python/tests`, with the wheel installed, or with `PYTHONPATH=python` and the program in
`DRAFTSMITH_PROGRAM`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from pathlib import Path
from unittest import mock

import draftsmith

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "fixtures" / "tiny-target"
WORKLOAD = TARGET / "eval.jsonl"
RUN_FILE = f"""
[run]
name = "small"
seed = 7
[target]
source = '{TARGET}'
[data]
sources = [{{ path = "prompts.jsonl" }}]
validation_rows = 8
max_length = 192
[regenerate]
max_new_tokens = 32
[draft]
vocab_size = 256
[train]
epochs = 1
tokens_per_step = 1024
[validate]
prompts = 4
max_new_tokens = 16
[bundle]
name = "small"
license = "CC0-1.0"
[bench]
workloads = ['{WORKLOAD}']
limit = 4
max_new_tokens = 16
"""
PROMPT = "Why is the sky blue?"


def unknown(record: object) -> list[str]:
    """Keys of the program's JSON that have no field, in a record and all inside it."""
    found = []
    if isinstance(record, (list, tuple)):
        return [name for one in record for name in unknown(one)]
    if dataclasses.is_dataclass(record):
        kind = type(record).__name__
        for f in dataclasses.fields(record):
            value = getattr(record, f.name)
            found += [f"{kind}.{key}" for key in value] if f.name == "extra" else unknown(value)
    return found


class WithARun(unittest.TestCase):
    """Tests that need a draft: one is made for all of them."""

    folder: tempfile.TemporaryDirectory[str]
    run_record: draftsmith.RunRecord
    lines: list[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        base = Path(cls.folder.name)
        os.environ["DRAFTSMITH_CACHE"] = str(base / "cache")
        rows = (TARGET / "prompts-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (base / "prompts.jsonl").write_text("".join(rows[:64]), encoding="utf-8")
        (base / "run.toml").write_text(RUN_FILE, encoding="utf-8")
        cls.lines = []
        cls.run_record = draftsmith.run("run.toml", {"train.lr": 2e-3}, progress=cls.lines.append, cwd=base)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folder.cleanup()

    @property
    def bundle(self) -> Path:
        assert self.run_record.bundle is not None and self.run_record.bundle.path is not None
        return self.run_record.bundle.path

    def test_a_run_is_told_stage_by_stage(self) -> None:
        made = self.run_record
        self.assertEqual([s.stage for s in made.stages], ["data", "regenerate", "capture", "train", "bundle", "bench"])
        self.assertTrue(all(s.phase == "done" and s.before is False for s in made.stages))
        self.assertEqual(made.path, Path(self.folder.name) / "runs" / "small")
        assert made.data and made.regenerate and made.capture and made.train and made.bench and made.report
        self.assertEqual(made.data.rows, 56)
        self.assertEqual(made.regenerate.trained_tokens, made.regenerate.generated_tokens)
        self.assertEqual(made.capture.tokens, made.regenerate.tokens)
        self.assertGreater(made.train.steps or 0, 0)
        self.assertTrue((self.bundle / "bundle.json").is_file())
        self.assertTrue(made.report.is_file())
        self.assertTrue(made.bench.identical)
        assert made.verdict is not None
        self.assertIn(made.verdict.setting, made.verdict.says)
        low, high = made.bench.accept_len_ci95 or (0.0, 0.0)
        self.assertLessEqual(low, made.bench.accept_len or 0.0)
        self.assertLessEqual(made.bench.accept_len or 0.0, high)
        self.assertIn("train: done", "\n".join(self.lines))
        # What is kept as JSON and what is typed are the same.
        told = next(s.summary for s in made.stages if s.stage == "bench")
        assert told is not None
        self.assertEqual(made.bench.speedup, told["results"]["speedup"])
        # The override, as the folder keeps it.
        train = next(s for s in made.stages if s.stage == "train")
        self.assertEqual(float(train.inputs["train.lr"]), 2e-3)

    def test_a_finished_run_is_found_again(self) -> None:
        again = draftsmith.run("run.toml", {"train.lr": 2e-3}, progress=False, cwd=self.folder.name)
        self.assertTrue(all(s.before for s in again.stages))
        assert again.bench is not None and self.run_record.bench is not None
        self.assertEqual(again.bench.committed_tokens, self.run_record.bench.committed_tokens)
        self.assertAlmostEqual(again.bench.speedup or 0.0, self.run_record.bench.speedup or 0.0)
        self.assertEqual(again.bundle, self.run_record.bundle)

    def test_every_key_of_the_programs_json_has_a_field(self) -> None:
        generated = draftsmith.generate(PROMPT, target=TARGET, bundle=self.bundle, max_new_tokens=8, prove=True)
        measured = draftsmith.bench(bundle=self.bundle, workload=WORKLOAD, limit=2, max_new_tokens=8)
        self.assertEqual(unknown([self.run_record, generated, measured]), [])

    def test_a_draft_is_measured(self) -> None:
        report = Path(self.folder.name) / "report"
        measured = draftsmith.bench(
            bundle=self.bundle, workload=[WORKLOAD], limit=3, max_new_tokens=8, depth=3, report=report
        )
        self.assertTrue(measured.identical)
        self.assertEqual((measured.rows, measured.workloads), (3, ("eval",)))
        self.assertEqual(len(measured.accept_rate_at), 3)
        self.assertIn("too_few_samples", [doubt.kind for doubt in measured.doubts])
        assert measured.machine is not None
        self.assertEqual(measured.machine.logical_cpus, os.cpu_count())
        self.assertTrue((report / "report.html").is_file())

    def test_the_text_is_the_same_with_and_without_the_draft(self) -> None:
        plain = draftsmith.generate(PROMPT, target=TARGET, max_new_tokens=24, temperature=0.8, seed=3)
        spec = draftsmith.generate(
            PROMPT, target=TARGET, bundle=self.bundle, max_new_tokens=24, temperature=0.8, seed=3, depth=4
        )
        self.assertEqual((plain.text, plain.token_ids), (spec.text, spec.token_ids))
        self.assertIsNone(plain.accept_len)
        self.assertIsNotNone(spec.accept_len)
        self.assertEqual(plain.finish_reason, "length")
        self.assertEqual(len(plain.token_ids), 24)

    def test_a_server_answers_until_its_with_ends(self) -> None:
        expected = draftsmith.generate(PROMPT, target=TARGET, max_new_tokens=12)
        with draftsmith.serve(bundle=self.bundle, model_name="small") as server:
            self.assertTrue(server.running)
            self.assertEqual((server.model, server.draft), ("small", "small"))
            body = {"model": "small", "max_tokens": 12, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
            request = urllib.request.Request(
                server.base_url + "/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            self.assertEqual(answer["choices"][0]["message"]["content"], expected.text)
            base_url = server.base_url
        self.assertFalse(server.running)
        self.assertEqual(server.log[-1], "ended")
        with self.assertRaises(OSError):
            urllib.request.urlopen(base_url + "/models", timeout=5)
        server.stop()
        # And once more, elsewhere.
        with server:
            self.assertTrue(server.running)

    def test_a_server_ends_with_the_interpreter(self) -> None:
        script = (
            "import draftsmith, sys\n"
            f"server = draftsmith.serve(bundle={str(self.bundle)!r}).start()\n"
            "print(server._child.pid)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        with self.assertRaises(ProcessLookupError):
            os.kill(int(done.stdout), 0)


class Alone(unittest.TestCase):
    """What needs no draft."""

    def test_errors_have_message_and_hint(self) -> None:
        with self.assertRaises(draftsmith.Error) as caught:
            draftsmith.generate(PROMPT, target="not-there")
        error = caught.exception
        self.assertEqual(error.message, "`not-there` does not exist")
        assert error.hint is not None
        self.assertIn("check the path", error.hint)
        self.assertEqual(error.exit_code, 2)
        self.assertIn("--target=not-there", error.command)
        self.assertEqual(str(error), f"{error.message}\nhint: {error.hint}")
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((again.message, again.hint, again.command), (error.message, error.hint, error.command))

    def test_a_wrong_key_of_a_run_file_is_named(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "run.toml").write_text("[train]\nepoch = 3\n", encoding="utf-8")
            with self.assertRaises(draftsmith.Error) as caught:
                draftsmith.run("run.toml", cwd=folder, progress=False)
            # What the exception says is not shown before it as well.
            shown: list[str] = []
            with self.assertRaises(draftsmith.Error):
                draftsmith.run("run.toml", cwd=folder, progress=shown.append)
        self.assertEqual([line for line in shown if "epoch" in line], [])
        error = caught.exception
        told = {error.message: error.hint, **dict(error.others)}
        self.assertEqual(told["run file `run.toml`, line 2: unknown key `train.epoch`"], "did you mean `train.epochs`?")
        self.assertIn("run file `run.toml`: key `target` is missing", told)
        self.assertIn("did you mean `train.epochs`?", str(error))

    def test_a_server_that_cannot_start_says_why(self) -> None:
        with self.assertRaises(draftsmith.Error) as caught:
            with draftsmith.serve(target="not-there"):
                self.fail("it started")
        self.assertEqual(caught.exception.message, "`not-there` does not exist")
        self.assertEqual(caught.exception.exit_code, 2)

    def test_an_option_that_the_program_has_not_is_its_error(self) -> None:
        with self.assertRaises(draftsmith.Error) as caught:
            draftsmith.generate(PROMPT, target=TARGET, extra=["--colour"])
        self.assertIn("--colour", caught.exception.message)

    def test_prompts_may_be_messages_or_ids_and_begin_with_a_dash(self) -> None:
        by_text = draftsmith.generate("-1 + 2?", target=TARGET, max_new_tokens=6)
        messages = [{"role": "user", "content": "-1 + 2?"}]
        by_messages = draftsmith.generate(messages=messages, target=TARGET, max_new_tokens=6)
        by_ids = draftsmith.generate(prompt_ids=by_text.prompt_ids, target=TARGET, max_new_tokens=6)
        self.assertEqual(by_text.token_ids, by_messages.token_ids)
        self.assertEqual(by_text.token_ids, by_ids.token_ids)

    def test_any_verb_can_be_called(self) -> None:
        self.assertEqual(draftsmith.call("doctor")["version"], draftsmith.__version__)

    def test_values_of_keys_are_toml(self) -> None:
        from draftsmith._verbs import Value, _toml

        cases: list[tuple[Value, str]] = [(True, "true"), (3, "3"), (5e-05, "5e-05"), ('a "b"\\', '"a \\"b\\"\\\\"'), (["x", 1], '["x", 1]')]
        for value, expected in cases:
            self.assertEqual(_toml(value), expected)

    def test_options_are_flags(self) -> None:
        from draftsmith._program import arguments

        options = {"max_new_tokens": 8, "auto": True, "prove": False, "seed": None, "stop": ["-a", "b"]}
        self.assertEqual(arguments(options), ["--max-new-tokens=8", "--auto", "--stop=-a", "--stop=b"])

    def test_the_program_can_be_named(self) -> None:
        with mock.patch.dict(os.environ, {"DRAFTSMITH_PROGRAM": "not-there"}):
            with self.assertRaises(draftsmith.Error) as caught:
                draftsmith.call("doctor")
        self.assertIn("`not-there`, which is no program", caught.exception.message)

    def test_the_module_is_the_program(self) -> None:
        done = subprocess.run([sys.executable, "-m", "draftsmith", "--version"], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, f"draftsmith {draftsmith.__version__}\n")

    @unittest.skipUnless(os.name == "posix", "signals")
    def test_an_interrupt_reaches_the_program_and_then_the_caller(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Stands for the program: says on SIGINT that it stops, as the real one does between two steps.
            stand_in = Path(folder, "stand-in")
            stand_in.write_text(
                f"#!{sys.executable}\n"
                "import signal, sys, time\n"
                f"def stop(*_): open({str(Path(folder, 'told'))!r}, 'w').close(); sys.exit(130)\n"
                "signal.signal(signal.SIGINT, stop)\n"
                f"open({str(Path(folder, 'up'))!r}, 'w').close()\n"
                "time.sleep(60)\n"
            )
            stand_in.chmod(0o755)

            def interrupt() -> None:
                while not Path(folder, "up").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)

            with mock.patch.dict(os.environ, {"DRAFTSMITH_PROGRAM": str(stand_in)}):
                threading.Thread(target=interrupt).start()
                with self.assertRaises(KeyboardInterrupt):
                    draftsmith.call("run", "run.toml")
            self.assertTrue(Path(folder, "told").exists())

    @unittest.skipUnless(os.name == "posix", "a script stands for the program")
    def test_what_does_not_hold_is_an_error_with_the_result(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stand_in = Path(folder, "stand-in")
            stand_in.write_text("#!/bin/sh\necho '{\"identical\": false}'\nexit 1\n")
            stand_in.chmod(0o755)
            with mock.patch.dict(os.environ, {"DRAFTSMITH_PROGRAM": str(stand_in)}):
                with self.assertRaises(draftsmith.NotHeld) as caught:
                    draftsmith.bench(workload="w.jsonl", bundle="b")
        self.assertEqual(caught.exception.result, {"identical": False})
        self.assertEqual(caught.exception.exit_code, 1)

    def test_the_example_runs(self) -> None:
        example = REPOSITORY / "python" / "examples" / "first_draft.py"
        with tempfile.TemporaryDirectory() as folder:
            # The module may stand on a path that counts from here.
            module = str(Path(draftsmith.__file__).resolve().parents[1])
            done = subprocess.run(
                [sys.executable, str(example), str(TARGET)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": module},
                capture_output=True,
                text=True,
                check=False,
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("the same text with and without the draft", done.stdout)


if __name__ == "__main__":
    unittest.main()
