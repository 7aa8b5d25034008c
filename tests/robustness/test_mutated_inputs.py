"""Every kind of file, mutated: a result or one line of error, within bounds, and nothing elsewhere.

A short budget of time in CI; by hand, with totals at the end:

    pytest tests/robustness --robustness-budget=30m
"""

import collections
import itertools
import shutil
import time
import warnings
import zlib
from pathlib import Path

import hypothesis
import pytest
from bounds import contents, within_bounds
from concept_inputs import CONCEPTS
from hypothesis import HealthCheck, Phase
from inputs import SUCCEEDED, Input
from learned_inputs import LEARNED, RUNS
from model_inputs import MODELS
from request_inputs import ASKED

INPUTS = [*CONCEPTS, *LEARNED, *RUNS, *MODELS, *ASKED]
EXAMPLES = 50  # of one seed
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@pytest.mark.parametrize("source", INPUTS, ids=lambda source: source.name)
def test_a_result_or_one_error(
    source: Input,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    record_property,
) -> None:
    for variable in ("HOME", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "secret").write_text("not to be read")
    given, elsewhere = tmp_path / "given", tmp_path / "elsewhere"
    given.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if isinstance(source.write, tuple):
        copied, *linked = source.write
        shutil.copytree(request.getfixturevalue(copied), given / copied)
        for name in linked:
            (given / name).symlink_to(request.getfixturevalue(name))
    else:
        source.write(given)
    file = given / source.file
    good = file.read_bytes()
    assert source.read(given) == SUCCEEDED, "the example itself is refused"
    file.write_bytes(good)
    before = contents(tmp_path, leave_out=given / source.output)
    outcomes: collections.Counter[str] = collections.Counter()
    share = request.config.getoption("robustness_budget") / len(INPUTS)
    end = time.monotonic() + share

    failed = False

    def check(content: bytes) -> None:
        nonlocal failed
        # one example at least; and a failure is still made small
        if time.monotonic() > end and outcomes.total() and not failed:
            return
        failed = True
        file.write_bytes(content)
        with within_bounds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[source.read(given)] += 1
        file.write_bytes(good)
        after = contents(tmp_path, leave_out=given / source.output)
        changed = {name for name, _ in before.items() ^ after.items()}
        assert not changed, f"changed or written: {sorted(changed)}"
        failed = False

    for number in itertools.count(zlib.crc32(source.name.encode())):
        run = SETTINGS(hypothesis.given(source.mutate(good))(check))
        hypothesis.seed(number)(run)()
        if time.monotonic() > end:
            break
    record_property("robustness", dict(outcomes))
