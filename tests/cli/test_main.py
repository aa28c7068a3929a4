"""What all commands share: arguments, help, the version, and how a command ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from ratelimit.cli import main
from ratelimit.runtime.signals import Interrupted, interruptible
from tests.support.command_line import COMMAND, answer, run


class TestArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("fly",),
            ("try",),
            ("try", "key"),
            ("inspect",),
            ("try", "key", "--limit", "1/s", "--wait", "x"),
            ("-x",),
        ],
    )
    def test_wrong_ones(self, arguments: tuple[str, ...]) -> None:
        command = run(*arguments)
        assert command.returncode == 2
        assert command.stderr.startswith("usage: ratelimit")

    @pytest.mark.parametrize("command", [(), ("try",), ("inspect",), ("reset",), ("remove",), ("demo",)])
    def test_help(self, command: tuple[str, ...]) -> None:
        assert answer(run(*command, "--help"), 0).startswith(f"usage: {' '.join(('ratelimit', *command))} ")

    def test_version(self) -> None:
        assert re.fullmatch(r"ratelimit-redis \S.*", answer(run("--version"), 0))


class TestEnding:
    @pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
    def test_a_reader_that_has_gone(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            command = [*COMMAND, "try", "key", "--limit", "1/s", "--url", "memory://"]
            ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
        finally:
            os.close(writer)
        assert (ended.stderr, ended.returncode) == (b"", 141)

    @pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
    def test_a_signal_that_a_finalizer_swallows_ends_it_a_moment_later(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Ending:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        began = []
        with pytest.raises(Interrupted) as interruption, interruptible():
            Ending()
            began.append(True)
            time.sleep(30)
        assert (began, interruption.value.number) == ([True], signal.SIGTERM)
        assert capsys.readouterr().err == ""

    @pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
    def test_nothing_comes_of_it_after_a_command_that_has_ended_by_then(self) -> None:
        class Ending:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        handler = signal.getsignal(signal.SIGALRM)
        with interruptible():
            Ending()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert signal.getsignal(signal.SIGALRM) == handler

    def test_runs_inside_a_program_as_well(self, capsys: pytest.CaptureFixture[str]) -> None:
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        statuses: list[int] = []

        def run_it() -> None:
            statuses.append(main(["try", "key", "--limit", "10/minute", "--url", "memory://"]))

        run_it()
        thread = threading.Thread(target=run_it)
        thread.start()
        thread.join()
        assert statuses == [0, 0]
        assert capsys.readouterr().out == "admitted, 9 left, full after 6 s\n" * 2
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
