"""The commands as people and scripts run them: exit status, formats, and what goes where."""

from __future__ import annotations

import json
import os
import pty
import re
import stat
import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from marked_models import (
    BIN,
    KEY,
    LAYERS,
    ROOT,
    THIEF,
    WEIGHTS,
    all_but_one_replaced,
    claim_about,
    command,
    evidence_of,
    fc1,
    like_timm,
    marked_arrays,
    push,
    refused,
    run,
    save_model,
    vit,
)
from test_verify import KEYS

import hf_watermark.cli
from hf_watermark import OwnerKey
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.verify import verify_hub_model

UMBRELLA = str(BIN / "hf-watermark")
COMMANDS = sorted(hf_watermark.cli._umbrella.commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A marked model with its claim, a stripped copy, an unmarked twin, and two keys."""
    place = tmp_path_factory.mktemp("place")
    save_model(place / "own", vit(), claim_about(vit()))
    save_model(place / "stolen", like_timm(vit()))
    save_model(place / "plain", vit(None))
    (place / "claim.json").write_bytes(claim_about(vit()).to_bytes())
    KEY.save(place / "acme.key")
    THIEF.save(place / "thief.key")
    return place


@pytest.fixture
def hub(loopback_hub, tmp_path):
    loopback_hub.create_repo("demo/vit")
    push("demo/vit", save_model(tmp_path / "own", vit(), claim_about(vit())))
    KEY.save(tmp_path / "acme.key")
    THIEF.save(tmp_path / "thief.key")
    return loopback_hub


def umbrella(*arguments, **options):
    return run(program=[UMBRELLA, *map(str, arguments)], **options)


class TestExitStatus:
    def test_found(self, place):
        done = run("own", "--key", "acme.key", cwd=place)
        assert (done.returncode, done.stderr) == (0, "")

    def test_not_found(self, place):
        for arguments in (("own", "--key", "thief.key"), ("plain", "--key", "acme.key")):
            done = run(*arguments, cwd=place)
            assert (done.returncode, done.stderr) == (1, "")

    def test_not_checked(self, place):
        refused(run("plain", cwd=place), "without a key", "Pass the owner's key with --key")

    def test_the_umbrella_does_the_same(self, place):
        for name, form in (("acme", "json"), ("thief", "json"), ("none", "json")):
            arguments = ("own", "--key", f"{name}.key", "--format", form)
            one = run(*arguments, cwd=place)
            two = umbrella("verify", *arguments, cwd=place)
            assert one.returncode == two.returncode
            assert one.stderr == two.stderr
            if one.stdout:
                first, second = evidence_of(one), evidence_of(two)
                assert {**first, "seconds": 0} == {**second, "seconds": 0}

    def test_the_first_commit_is_shown(self, hub, tmp_path):
        first = HfApi().model_info("demo/vit").sha
        push("demo/vit", {"notes.md": b"x"})
        done = run("demo/vit", "--key", tmp_path / "acme.key", hub=hub)
        assert f"  since     {first}, the first commit" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 100

    def test_on_the_hub(self, hub, tmp_path):
        for key, status in (("acme", 0), ("thief", 1), ("none", 2)):
            done = run("demo/vit", "--key", tmp_path / f"{key}.key", hub=hub)
            assert done.returncode == status, done.stderr


class TestFormats:
    def test_json(self, place):
        found = run("own", "--key", "acme.key", "--format", "json", cwd=place)
        evidence = evidence_of(found)
        assert list(evidence) == KEYS
        python = verify_hub_model(place / "own", KEY).to_dict()
        assert {**evidence, "seconds": 0} == {**python, "repo": "own", "seconds": 0}
        short = evidence_of(run("own", "--key", "acme.key", "--json", cwd=place))
        assert {**short, "seconds": 0} == {**evidence, "seconds": 0}
        for key in ("acme", "thief"):
            assert list(evidence_of(run("own", "--key", f"{key}.key", "--json", cwd=place))) == KEYS

    def test_json_without_a_key(self, place):
        done = run("own", "--json", cwd=place)
        evidence = evidence_of(done)
        assert list(evidence) == KEYS
        assert evidence["verdict"] == "not checked"
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "verdict"),
        [
            (("own", "--key", "acme.key"), "found\n"),
            (("own", "--key", "thief.key"), "not found\n"),
            (("own",), "not checked\n"),
        ],
    )
    def test_quiet(self, place, arguments, verdict):
        assert run(*arguments, "--format", "quiet", cwd=place).stdout == verdict

    def test_the_last_one_counts(self, place):
        done = run("own", "--key", "acme.key", "--json", "--format", "quiet", cwd=place)
        assert done.stdout == "found\n"

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "utf-16"])
    def test_names_and_encodings(self, place, tmp_path, encoding):
        folder = save_model(tmp_path / "модель é", vit())
        environment = {"PYTHONIOENCODING": encoding}
        for form in ("human", "json", "quiet"):
            done = subprocess.run(
                command(folder, "--key", place / "acme.key", "--format", form),
                env={"PATH": str(BIN), "PYTHONPATH": ROOT} | environment,
                capture_output=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, b""), form
            if form == "json":
                assert json.loads(done.stdout)["repo"] == str(folder)

    def test_a_folder_whose_name_is_no_text(self, place, tmp_path):
        folder = os.fsdecode(bytes(save_model(tmp_path / "x", vit()).parent) + b"/\xff")
        os.rename(tmp_path / "x", folder)
        for form in ("human", "json", "quiet"):
            done = subprocess.run(
                command(folder, "--key", place / "acme.key", "--format", form),
                env={"PATH": str(BIN), "PYTHONPATH": ROOT},
                capture_output=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, b""), form
            said = done.stdout.decode()
            if form == "json":
                assert json.loads(said)["repo"] == folder


class TestHumanOutput:
    """What a stranger reads; never more than was measured."""

    def test_found(self, place):
        said = run("own", "--key", "acme.key", cwd=place).stdout
        lines = said.splitlines()
        assert lines[0] == "FOUND  own"
        evidence = verify_hub_model(place / "own", KEY)
        power = int(re.search(r"A chance of 1 in 10\^(\d+) that an unrelated model", said)[1])
        assert power == int(-evidence.log10_p)
        shown = float(re.search(r"log10 p (-[\d.]+),", said)[1])
        assert evidence.log10_p <= shown <= evidence.log10_p + 0.01
        assert "all 7 tries counted" in said
        assert "64 of 64" in said
        assert "signed, under the name acme\n" in said
        assert fc1(0) in said
        assert f"and {LAYERS - 1} more" in said
        assert "Not proven by this alone" in said
        assert max(map(len, lines)) <= 100

    def test_not_found(self, place):
        said = run("plain", "--key", "acme.key", cwd=place).stdout
        assert said.startswith("NOT FOUND  plain\n")
        assert "no evidence" in said
        assert "that the model is independent" in said
        assert "A chance of" not in said

    def test_nearly_found(self, place):
        p = verify_hub_model(place / "own", KEY, read="all").log10_p
        done = run("own", "--key", "acme.key", "--alpha", f"{10 ** (p - 0.003):.8e}", cwd=place)
        assert done.returncode == 1
        assert "not enough" in done.stdout
        shown = float(re.search(r"log10 p (-[\d.]+),", done.stdout)[1])
        assert shown >= p

    def test_one_carrier(self, tmp_path, place):
        save_model(tmp_path / "m", all_but_one_replaced(vit()))
        said = run(tmp_path / "m", "--key", place / "acme.key", "--alpha", "1e-30").stdout
        assert "raw, one carrier: one carrier alone, under its own name" in said

    def test_without_a_key(self, place):
        done = run("own", cwd=place)
        assert done.stdout.startswith("NOT CHECKED  own\n")
        assert "All 6 claimed tensors are here, unchanged" in done.stdout
        assert "Ownership was not tested" in done.stdout
        assert "chance" not in done.stdout
        refused(
            done, "Ownership was not tested", "owner's key", "Pass --key FILE", stdout=done.stdout
        )

    def test_a_claims_text_is_no_command_to_the_terminal(self, place, tmp_path):
        # A thief's claim, well signed, whose owner's name clears the screen and says FOUND.
        import dataclasses

        draft = dataclasses.replace(
            claim_about(vit(), THIEF), owner="\x1b[2J\x1b[1;32mFOUND\nmodel", signature=""
        )
        forged = dataclasses.replace(draft, signature=THIEF.sign(draft._signed_bytes()))
        folder = save_model(tmp_path / "m", vit(None), forged)
        for arguments in ((), ("--key", place / "acme.key")):
            done = run(folder, *arguments)
            for output in (done.stdout, done.stderr):
                assert "\x1b" not in output
                assert "\nmodel" not in output

    def test_tensor_names_are_no_commands_either(self, place, tmp_path):
        name = "blocks.0.\x1b[2Jmlp\n.fc1.weight"
        shapes = {name: (256, 256), "blocks.1.mlp.fc1.weight": (256, 256)}
        done = run(save_model(tmp_path / "m", marked_arrays(shapes, KEY, strength=0.2)),
                   "--key", place / "acme.key")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout

    def test_colours_for_a_terminal_only(self, place):
        assert "\x1b[" not in run("own", "--key", "acme.key", cwd=place).stdout
        code, said = in_a_terminal(command("own", "--key", "acme.key"), cwd=place)
        assert code == 0
        assert "\x1b[32m\x1b[1mFOUND\x1b[0m" in said


def in_a_terminal(arguments, cwd, typed: bytes = b"", environment=None):
    """Run a command with a terminal for all of its streams; the status and what was shown."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe(
            arguments[0],
            arguments,
            {"PATH": str(BIN), "PYTHONPATH": ROOT, "TERM": "xterm"} | (environment or {}),
        )
    shown = b""
    if typed:
        while b":" not in shown:
            shown += os.read(master, 1000)
        os.write(master, typed)
    try:
        while part := os.read(master, 10_000):
            shown += part
    except OSError:
        pass
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


class TestUsage:
    """Whatever is wrong with the arguments: exit 2, one line, nothing on stdout."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), ("Missing argument", "REPO")),
            (("own", "more"), ("unexpected extra argument", "more")),
            (("own", "more\nlines"), ("unexpected extra argument",)),
            (("own", "--frobnicate"), ("No such option", "--frobnicate")),
            (("own", "--alpha"), ("--alpha", "requires an argument")),
            (("own", "--key", "acme.key", "--alpha", "small"), ("--alpha", "'small'", "float")),
            (("own", "--key", "acme.key", "--alpha", "0"), ("alpha", "between 0 and 1", "got 0.0")),
            (("own", "--key", "acme.key", "--alpha", "1"), ("alpha", "between 0 and 1", "got 1.0")),
            (("own", "--key", "acme.key", "--alpha", "-1e-6"), ("alpha", "between 0 and 1")),
            (("own", "--key", "acme.key", "--alpha", "nan"), ("alpha", "got nan")),
            (("own", "--key", "acme.key", "--alpha", "inf"), ("alpha", "got inf")),
            (("own", "--key", "acme.key", "--format", "xml"), ("--format", "'xml'", "'json'")),
            (("own", "--key", "acme.key", "--align", "no"), ("--align", "'no'", "'never'")),
            (("own", "--key", "acme.key", "--read", "some"), ("--read", "'some'", "'all'")),
            (("own", "--recipient", "x"), ("need the owner's key", "Pass --key FILE")),
            (("own", "--write-card"), ("need the owner's key", "Pass --key FILE")),
            (("own", "--create-pr"), ("need the owner's key", "Pass --key FILE")),
            (("own", "--key", "acme.key", "--revision", "main"), ("local folder", "no revision")),
            (("nothing", "--key", "acme.key"), ("neither a repo nor a folder", "org/name")),
            (("./nothing", "--key", "acme.key"), ("nothing there", "Check the path")),
            (("claim.json", "--key", "acme.key"), ("claim.json", ".safetensors file")),
            (("", "--key", "acme.key"), ("neither a repo nor a folder",)),
            (("a/b/c", "--key", "acme.key"), ("neither a repo nor a folder",)),
            (("https://huggingface.co/a/b", "--key", "acme.key"), ("neither a repo",)),
        ],
        ids=str,
    )
    def test_arguments(self, place, arguments, words):
        refused(run(*arguments, cwd=place), *words)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), ("No command was given",)),
            (("frobnicate",), ("No such command", "'frobnicate'", "See hf-watermark --help")),
            (("verify",), ("Missing argument", "See hf-watermark verify --help")),
            (("--frobnicate",), ("No such option",)),
            (("keygen", "--format", "xml"), ("'xml'", "See hf-watermark keygen --help")),
            (("card", "own"), ("--key", "See hf-watermark card --help")),
            (("demo", "--seeds", "0"), ("--seeds", "range")),
        ],
        ids=str,
    )
    def test_of_the_umbrella(self, place, arguments, words):
        done = umbrella(*arguments, cwd=place)
        refused(done, *words, stdout=done.stdout)
        assert bool(done.stdout) == (not arguments)  # the help, for who typed the name alone

    def test_no_bug_looks_like_an_answer(self, place):
        # An error of ours: still one line and exit 2; the traceback for who asks.
        code = (
            "import hf_watermark.verify as v; v.verify = lambda *a, **k: 1/0;"
            "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
        )
        program = [sys.executable, "-c", code, "own", "--key", "acme.key"]
        done = run(program=program, cwd=place)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "Unexpected ZeroDivisionError: division by zero" in done.stderr
        done = run(program=program, cwd=place, environment={"HF_WATERMARK_DEBUG": "1"})
        assert "Traceback" in done.stderr

    def test_interrupted(self, place):
        code = (
            "import signal, hf_watermark.verify as v;"
            "signal.signal(signal.SIGINT, signal.default_int_handler);"  # shells' & ignores it
            "v.verify = lambda *a, **k: signal.raise_signal(signal.SIGINT);"
            "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
        )
        done = run(program=[sys.executable, "-c", code, "own", "--key", "acme.key"], cwd=place)
        assert done.returncode == 130
        assert done.stderr.strip() == "error: interrupted"

    def test_a_reader_that_went_away(self, place):
        done = subprocess.run(
            ["sh", "-c", f"{BIN}/verify_hub_model own --key acme.key --json | true"],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("option", ["--help", "-h"])
    def test_every_command_shows_an_example(self, name, option):
        done = umbrella(name, option)
        assert (done.returncode, done.stderr) == (0, "")
        example = re.search(r"\n  Example:\n((?:    .+\n)+)", done.stdout)
        assert example is not None, done.stdout
        own = "verify_hub_model" if name == "verify" else f"hf-watermark {name}"
        assert own in example[1]

    @pytest.mark.parametrize("program", ["hf-watermark", "verify_hub_model"])
    def test_of_the_programs(self, program):
        done = run(program=[str(BIN / program), "--help"])
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(rf"\n  Example:\n    {program} ", done.stdout)
        assert "\\b" not in done.stdout

    def test_every_option_of_the_contract(self):
        said = run("--help").stdout
        for option in (
            "--key FILE", "--revision R", "--alpha A", "--claim FILE|REPO", "--recipient NAME",
            "--align [auto|never]", "--read [auto|all]", "--write-card", "--create-pr",
            "--report FILE.html", "--format [human|json|quiet]", "--json", "--token T", "REPO",
        ):  # fmt: skip
            assert option in said, option
        for status in ("0 found", "1 not found", "2 could not be"):
            assert status in said

    def test_the_examples_are_commands(self):
        # Every option that an example uses exists.
        for name in COMMANDS:
            said = umbrella(name, "--help").stdout
            example = re.search(r"\n  Example:\n((?:    .+\n)+)", said)[1]
            for option in re.findall(r"\s(--[\w-]+)", example):
                assert re.search(rf"^  (-\w, )?{option}\b", said, re.MULTILINE), (name, option)

    def test_version(self):
        done = umbrella("--version")
        assert done.returncode == 0
        assert re.search(r"\d+\.\d+", done.stdout)


class TestOptions:
    def test_alpha(self, place):
        for alpha, status in (("1e-6", 0), ("0.5", 0), ("1e-300", 1)):
            done = run("own", "--key", "acme.key", "--alpha", alpha, "--json", cwd=place)
            assert done.returncode == status
            assert evidence_of(done)["alpha"] == float(alpha)

    def test_claim(self, hub, place):
        for claim in ("claim.json", "own", "demo/vit", place / "own" / CLAIM_FILE):
            done = run(
                "stolen", "--key", "acme.key", "--claim", claim, "--json", hub=hub, cwd=place
            )
            assert done.returncode == 0, done.stderr
            assert evidence_of(done)["reading"] == "renamed"

    def test_recipient(self, place, tmp_path):
        save_model(tmp_path / "copy", vit(KEY.for_recipient("customer-17")))
        arguments = (tmp_path / "copy", "--key", "acme.key", "--recipient")
        assert run(*arguments, "customer-17", cwd=place).returncode == 0
        assert run(*arguments, "customer-18", cwd=place).returncode == 1

    def test_nobodys_copy(self, place):
        done = run("own", "--key", "acme.key", "--recipient", "", cwd=place)
        refused(done, "recipient", "not empty", advice=False)

    def test_read_and_align(self, place):
        for option in (("--read", "all"), ("--read", "auto"), ("--align", "never")):
            assert run("own", "--key", "acme.key", *option, cwd=place).returncode == 0

    def test_revision(self, hub, tmp_path):
        api = HfApi()
        marked = api.model_info("demo/vit").sha
        api.create_tag("demo/vit", tag="v1.0")
        proposed = push("demo/vit", {"notes.md": b"x"}, create_pr=True)
        plain = push(
            "demo/vit", {WEIGHTS: (save_model(tmp_path / "p", vit(None)) / WEIGHTS).read_bytes()}
        )
        for revision, sha, status in (
            ("main", plain, 1),
            ("v1.0", marked, 0),
            (marked, marked, 0),
            ("refs/pr/1", proposed, 0),
        ):
            done = run("demo/vit", "--key", tmp_path / "acme.key", "--revision", revision, "--json",
                       hub=hub)  # fmt: skip
            assert (done.returncode, evidence_of(done)["revision"]) == (status, sha), done.stderr

    def test_token(self, hub, tmp_path):
        hub.create_repo("demo/secret", private=True)
        push("demo/secret", tmp_path / "own")
        arguments = ("demo/secret", "--key", tmp_path / "acme.key", "--json")
        assert run(*arguments, hub=hub).returncode == 0  # HF_TOKEN
        assert run(*arguments, "--token", hub.token, hub=hub, token="").returncode == 0
        refused(run(*arguments, hub=hub, token=""), "or it is private", "--token")
        done = run(*arguments, "--token", "hf_wrong", hub=hub, token="")
        assert "hf_wrong" not in refused(done, "does not accept the token")

    def test_report(self, place, tmp_path):
        for arguments, status in (
            (("own", "--key", "acme.key"), 0),
            (("own", "--key", "thief.key"), 1),
            (("own",), 2),
        ):
            page = tmp_path / f"report {status}.html"
            done = run(*arguments, "--report", page, "--format", "quiet", cwd=place)
            assert done.returncode == status
            assert f"The report is in {page}" in done.stderr
            text = page.read_text(encoding="utf-8")
            assert text.startswith("<!doctype html>")
            assert done.stdout.strip() in text.lower()

    def test_progress_for_a_person_who_waits(self, place, tmp_path):
        # Every block takes a while; the name of the folder is no markup of the bar's.
        shapes = {f"blocks.{i}.mlp.fc1.weight": (1024, 256) for i in range(4)}
        save_model(tmp_path / "[/red]", marked_arrays(shapes, None))
        code = (
            "import time, hf_watermark.checkpoint as c; real = c.read_rows;"
            "c.read_rows = lambda *a: time.sleep(.5) or real(*a);"
            "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
        )
        program = [sys.executable, "-c", code]
        arguments = ["[/red]", "--key", str(place / "acme.key"), "--json"]
        status, shown = in_a_terminal([*program, *arguments], tmp_path)
        assert status == 1
        assert "Reading [/red]" in shown
        assert "100%" in shown
        done = run(*arguments, program=program, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        assert evidence_of(done)["verdict"] == "not found"

    def test_a_report_that_cannot_be_written(self, place, tmp_path):
        for path in (tmp_path / "none" / "r.html", tmp_path):
            done = run("own", "--key", "acme.key", "--report", path, "--format", "quiet", cwd=place)
            refused(done, "cannot be written", "another path", stdout="found\n")

    def test_the_libraries_are_not_loaded(self, place):
        code = (
            "import sys, atexit; heavy = {'torch', 'transformers', 'datasets', 'PIL'};"
            "atexit.register(lambda: print(sorted(heavy & set(sys.modules))));"
            "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
        )
        done = run(program=[sys.executable, "-c", code, "own", "--key", "acme.key"], cwd=place)
        assert done.returncode == 0
        assert done.stdout.endswith("\n[]\n")


class TestEmbed:
    """Marks without training: what is said, and what is refused before or while writing."""

    def embed(self, place, *arguments, source="plain", **options):
        return umbrella("embed", source, "--key", "acme.key", *arguments, cwd=place, **options)

    def test_what_is_said(self, place, tmp_path):
        done = self.embed(place, "--out", tmp_path / "a", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        said = evidence_of(done)
        assert said["output"] == str(tmp_path / "a")
        assert said["carriers"] == [fc1(i) for i in range(LAYERS)]
        assert (said["unchanged"], said["margin"] > 4, said["log10_p"] < -100) == (
            False,
            True,
            True,
        )
        assert verify_hub_model(tmp_path / "a", KEY).found
        done = self.embed(place, "--out", tmp_path / "b", "--format", "quiet")
        assert (done.returncode, done.stdout) == (0, f"{tmp_path}/b\n")
        done = self.embed(place, "--out", tmp_path / "c", source=tmp_path / "a")
        assert "was there already; no weight was changed" in done.stdout
        done = self.embed(place, "--out", tmp_path / "d", "--bits", "32")
        assert re.search(r"marked 6 tensors; the largest changed by \d+\.\d\d%", done.stdout)
        assert verify_hub_model(tmp_path / "d", KEY).bits == 32

    def test_carriers_that_are_kept_secret(self, place, tmp_path):
        own = tmp_path / "own.json"
        pattern = "*.attention.output.*.weight"
        arguments = ("--out", tmp_path / "out", "--carriers", pattern, "--own-claim", own)
        done = self.embed(place, *arguments)
        assert done.returncode == 0, done.stderr
        assert f"marked {LAYERS} tensors" in done.stdout
        assert own.stat().st_mode & 0o777 == 0o600
        for path in (tmp_path / "out").glob("*.json"):
            assert b"attention.output" not in path.read_bytes()
        suspect = tmp_path / "out"
        assert verify_hub_model(suspect, KEY, claim=own).found
        checked = umbrella("verify", suspect, "--key", "acme.key", cwd=place)
        refused(checked, "does not name its carriers")
        refused(self.embed(place, *arguments), "a new file", advice=False)
        refused(self.embed(place, *arguments[:4]), "--own-claim", advice=False)
        nowhere = (*arguments[:2], "--own-claim", tmp_path / "no" / "own.json")
        refused(self.embed(place, *nowhere), "no such folder", advice=False)
        missing = ("--out", tmp_path / "b", "--carriers", "*.nope.*", "--own-claim", "c.json")
        refused(self.embed(place, *missing), "No carrier is called so")
        assert not (tmp_path / "b").exists()

    def test_what_a_person_should_know(self, place, tmp_path):
        source = save_model(tmp_path / "source", vit(), claim_about(vit(), THIEF))
        (source / "pytorch_model.bin").write_bytes(b"unmarked")
        done = self.embed(place, "--out", tmp_path / "out", "--json", source=source)
        assert done.returncode == 0
        assert evidence_of(done)["output"]
        assert done.stderr == (
            f"Another owner's claim was kept as watermark-{THIEF.fingerprint}.json.\n"
            "warning: these may hold the weights too, unmarked: pytorch_model.bin\n"
        )

    def test_pushed(self, hub, tmp_path):
        save_model(tmp_path / "plain", vit(None))
        done = self.embed(tmp_path, "--recipient", "customer-17", "--push", "demo/c17", hub=hub)
        assert done.returncode == 0, done.stderr
        said = rf"{hub.endpoint}/demo/c17/commit/[0-9a-f]{{40}}: marked 6 tensors; "
        assert re.match(said, done.stdout), done.stdout
        assert verify_hub_model("demo/c17", KEY).found
        assert verify_hub_model("demo/c17", KEY, recipient="customer-17").found

    @pytest.mark.parametrize("limit", [100, 100_000])
    def test_a_disk_that_is_full(self, place, tmp_path, limit):
        """A file grows to a limit and no further: the first one, then the weights."""
        program = (
            "import resource;"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY));"
            "from hf_watermark.cli import main; main()"
        )
        arguments = ("embed", "plain", "--key", "acme.key", "--out", tmp_path / "new" / "out")
        done = run(*arguments, program=[sys.executable, "-c", program], cwd=place)
        refused(done, f"'{tmp_path}/new/out' cannot be written", "Make room", "nothing was left")
        assert not any(tmp_path.iterdir())

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount")
    def test_a_file_system_that_is_full(self, place, tmp_path):
        (tmp_path / "small").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path / "small")]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount")
        try:
            done = self.embed(place, "--out", tmp_path / "small" / "out")
            refused(done, "cannot be written", "No space left on device", "Make room")
            assert not any((tmp_path / "small").iterdir())
        finally:
            subprocess.run(["umount", str(tmp_path / "small")], check=True)

    def test_an_output_that_is_there(self, place, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_bytes(b"1")
        done = self.embed(place, "--out", tmp_path / "out")
        refused(
            done, f"'{tmp_path}/out' exists", "expected a new or empty folder", "Choose another"
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
        refused(self.embed(place, "--out", "plain/out"), "lies in the source", "outside of it")
        assert not (place / "plain" / "out").exists()
        (tmp_path / "out" / "precious").unlink()
        assert self.embed(place, "--out", tmp_path / "out").returncode == 0

    def test_sources_that_cannot_be_marked(self, place, tmp_path):
        (tmp_path / "pickled").mkdir()
        (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
        (tmp_path / "pickled" / "config.json").write_text("{}")
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / WEIGHTS).write_bytes(bytes(100))
        for source, words in (
            ("pickled", ("safetensors", "pytorch_model.bin", "pickles are never opened")),
            ("empty", ("safetensors",)),
            ("broken", (WEIGHTS,)),
            ("none", ("nothing there",)),
        ):
            done = self.embed(place, "--out", tmp_path / "out", source=tmp_path / source)
            refused(done, *words)
        assert not (tmp_path / "out").exists()

    def test_where_to(self, place, tmp_path):
        both = ("--out", tmp_path / "out", "--push", "demo/vit")
        for arguments in ((), both):
            done = self.embed(place, *arguments)
            refused(done, "where to write", "either --out DIR or --push REPO", advice=False)
        refused(self.embed(place, "--out", tmp_path / "out", "--bits", "0"), "bits", advice=False)
        done = self.embed(place, "--out", tmp_path / "out", "--bits", "4096")
        refused(done, "too small", "Use Scheme(bits=")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def copy(place):
    """The same place with a copy marked for a recipient too, and a list of names."""
    done = umbrella("embed", "own", "--key", "acme.key", "--recipient", "Zoë & Söhne",
                    "--out", "copy", cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (place / "names.txt").write_text("acme\nZoë & Söhne\nbeta\n", encoding="utf-8")
    return place


class TestTrace:
    """Whose copy: names from a file, the answer, and lists that are none."""

    def trace(self, place, *arguments, repo="copy", names="names.txt", **options):
        arguments = (repo, "--key", "acme.key", "--recipients", names, *arguments)
        return umbrella("trace", *arguments, cwd=place, **options)

    def test_named(self, copy):
        done = self.trace(copy)
        assert (done.returncode, done.stderr) == (0, "")
        said = re.fullmatch(
            r"copy: the copy of Zoë & Söhne\. A chance of 1 in 10\^(\d+) that a copy nobody was "
            r"handed names anyone so firmly \(log10 p -(\d+\.\d\d), 3 recipients and 3 tries "
            r"counted\)\.\n",
            done.stdout,
        )
        assert said is not None, done.stdout
        assert int(said[1]) == int(float(said[2])) > 20
        done = self.trace(copy, "--json")
        found = evidence_of(done)
        assert (found["verdict"], found["recipient"]) == ("found", "Zoë & Söhne")
        assert found["log10_p"] == pytest.approx(-float(said[2]), abs=0.01)
        assert found["runner_up_log10_p"] > -6
        assert (found["tries"], found["revision"]) == (3, None)
        assert self.trace(copy, "--format", "quiet").stdout == "Zoë & Söhne\n"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_lists_of_all_editors(self, copy, tmp_path, encoding, end):
        # The first name is the one that a byte order mark would spoil.
        lines = ("Zoë & Söhne", "", "  acme \t", "   ", "beta")
        (tmp_path / "names").write_bytes(end.join(lines).encode(encoding))
        done = self.trace(copy, "--json", names=tmp_path / "names")
        assert (done.returncode, done.stderr) == (0, "")
        assert (evidence_of(done)["recipient"], evidence_of(done)["tries"]) == ("Zoë & Söhne", 3)

    def test_a_terminal_of_another_encoding(self, copy):
        # The list is UTF-8 whatever the locale says.
        latin = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = self.trace(copy, "--json", environment=latin)
        assert evidence_of(done)["recipient"] == "Zoë & Söhne"

    def test_nobody(self, copy, tmp_path):
        (tmp_path / "others").write_text("acme\nbeta\n")
        for repo, names in (
            ("copy", tmp_path / "others"),
            ("own", "names.txt"),
            ("plain", "names.txt"),
        ):
            done = self.trace(copy, repo=repo, names=names)
            assert done.returncode == 1
            assert re.fullmatch(r"Only the raw weights were read: .* --claim\.\n", done.stderr)
            assert re.fullmatch(rf"{repo}: nobody's copy \(log10 p .*\)\.\n", done.stdout)
            assert self.trace(copy, "--format", "quiet", repo=repo, names=names).stdout == "\n"
            found = evidence_of(self.trace(copy, "--json", repo=repo, names=names))
            assert (found["verdict"], found["recipient"]) == ("not found", None)

    def test_alpha(self, copy):
        assert self.trace(copy, "--alpha", "1e-300").returncode == 1
        for alpha in ("0", "-1", "1", "nan"):
            refused(self.trace(copy, "--alpha", alpha), "between 0 and 1")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", ("No recipients are named",)),
            (b"\xef\xbb\xbf\r\n \r\n", ("No recipients are named",)),
            (b"acme\nbeta\n acme\n", ("more than once", "'acme' 2 times")),
            ("Zoë".encode("latin-1"), ("'bad'", "expected UTF-8", "Save it as UTF-8")),
            ("acme".encode("utf-16"), ("'bad'", "expected UTF-8", "Save it as UTF-8")),
        ],
        ids=["empty", "blank", "repeated", "latin-1", "utf-16"],
    )
    def test_bad_lists(self, copy, content, words):
        (copy / "bad").write_bytes(content)
        for form in ("human", "json"):
            refused(self.trace(copy, "--format", form, names="bad"), *words)

    def test_no_list(self, copy):
        refused(self.trace(copy, names="none.txt"), "'none.txt'", "No such file")
        refused(self.trace(copy, names="own"), "'own'", "Is a directory")
        done = umbrella("trace", "copy", "--key", "acme.key", cwd=copy)
        refused(done, "Missing option '--recipients'")


class TestKeys:
    def test_keygen(self, tmp_path):
        done = umbrella("keygen", "acme.key", "--owner", "acme", "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        said = evidence_of(done)
        assert list(said) == ["path", "fingerprint", "commitment", "public_key"]
        key = OwnerKey.load(tmp_path / "acme.key")
        assert (key.owner, key.fingerprint) == ("acme", said["fingerprint"])
        assert stat.S_IMODE((tmp_path / "acme.key").stat().st_mode) == 0o600
        assert (tmp_path / "acme.key").read_text() not in done.stdout
        again = umbrella("keygen", "acme.key", cwd=tmp_path)
        refused(again, "exists and does not hold this key", "Choose another path")
        assert OwnerKey.load(tmp_path / "acme.key") == key

    def test_keygen_for_people_and_scripts(self, tmp_path):
        done = umbrella("keygen", cwd=tmp_path)
        key = OwnerKey.load(tmp_path / "owner.key")
        assert done.stdout == f"Key {key.fingerprint} is in owner.key.\n"
        assert "Keep it secret" in done.stderr
        done = umbrella("keygen", "k", "--format", "quiet", cwd=tmp_path)
        assert done.stdout == f"{OwnerKey.load(tmp_path / 'k').fingerprint}\n"
        refused(umbrella("keygen", "none/k", cwd=tmp_path), "cannot be written", advice=False)

    def test_a_passphrase(self, place, tmp_path):
        secret = {"HF_WATERMARK_PASSPHRASE": "correct horse"}
        done = umbrella("keygen", "k", "--encrypt", cwd=tmp_path, environment=secret)
        assert done.returncode == 0, done.stderr
        assert "secret" not in json.loads((tmp_path / "k").read_text())
        arguments = (place / "own", "--key", tmp_path / "k", "--format", "quiet")
        done = run(*arguments, environment=secret)
        assert (done.returncode, done.stdout) == (1, "not found\n")
        refused(run(*arguments), "is encrypted", "HF_WATERMARK_PASSPHRASE")
        wrong = {"HF_WATERMARK_PASSPHRASE": "wrong horse"}
        done = run(*arguments, environment=wrong)
        line = refused(done, "does not open", "passphrase", advice=False)
        assert "horse" not in line
        refused(umbrella("keygen", "k2", "--encrypt", cwd=tmp_path), "HF_WATERMARK_PASSPHRASE")
        assert not (tmp_path / "k2").exists()

    def test_a_passphrase_typed(self, place, tmp_path):
        KEY.save(tmp_path / "k", "correct horse")
        arguments = command(place / "own", "--key", tmp_path / "k", "--format", "quiet")
        code, shown = in_a_terminal(arguments, tmp_path, b"correct horse\n")
        assert code == 0
        assert "found" in shown
        assert "horse" not in shown
        code, shown = in_a_terminal(arguments, tmp_path, b"wrong horse\n")
        assert code == 2
        assert "does not open" in shown

    def test_a_key_that_others_can_read(self, place, tmp_path):
        KEY.save(tmp_path / "k")
        (tmp_path / "k").chmod(0o644)
        done = run(place / "own", "--key", tmp_path / "k", "--json")
        assert done.returncode == 0
        assert evidence_of(done)["verdict"] == "found"
        assert (
            done.stderr
            == f"warning: {tmp_path}/k can be read by other users; run: chmod 600 {tmp_path}/k\n"
        )


class TestCard:
    def test_printed(self, hub, tmp_path):
        before = HfApi().model_info("demo/vit").sha
        done = umbrella("card", "demo/vit", "--key", tmp_path / "acme.key", hub=hub)
        assert (done.returncode, done.stderr) == (0, "")
        assert "<!-- hf-watermark:begin -->" in done.stdout
        assert done.stdout.startswith("---\n")
        assert HfApi().model_info("demo/vit").sha == before

    def test_nothing_to_print(self, place):
        done = umbrella("card", "own", "--key", "thief.key", cwd=place)
        assert (done.returncode, done.stdout) == (1, "")
        assert "not found" in done.stderr


def test_the_secret_is_shown_nowhere(hub, tmp_path):
    secret = bytes(range(32))
    import base64

    needles = (secret, secret.hex().encode(), base64.b64encode(secret))
    said = b""
    for form in ("human", "json", "quiet"):
        page = tmp_path / f"{form}.html"
        done = run("demo/vit", "--key", tmp_path / "acme.key", "--format", form, "--write-card",
                   "--report", page, hub=hub)  # fmt: skip
        assert done.returncode == 0, done.stderr
        said += done.stdout.encode() + done.stderr.encode() + page.read_bytes()
    said += hub.bytes_of()
    assert b"hf-watermark:begin" in said
    for needle in needles:
        assert needle not in said
