"""Commands in turns: what is asked of a peer, and what is made of its answers."""

import json
import sys

import pytest

from benchmarks.paired import Turns, Whole, in_pairs, main


class Fake:
    def __init__(self, seconds, order):
        self.seconds, self.order = iter(seconds), order

    def __call__(self):
        self.order.append(self)
        return next(self.seconds)

    def close(self):
        return 7


def test_pairs_alternate_and_their_ratios_count():
    order = []
    ours, peer = Fake([1, 2, 4], order), Fake([2, 2, 12], order)
    measured = in_pairs(ours, peer, 3)
    assert order == [ours, peer, peer, ours, ours, peer]
    assert measured["ratios"] == [2, 1, 3]
    assert measured["times_better"] == 2
    assert measured["cpu_seconds"] == {"ours": 2, "peer": 2}
    assert measured["peak_bytes"] == {"ours": 7, "peer": 7}


PEER = "import sys\nfrom benchmarks.paired import take_turns\ntake_turns(lambda: print('turned', file=sys.stderr), 2)"


def test_a_peer_is_called_once_for_every_turn(capfd):
    side = Turns(f'{sys.executable} -c "{PEER}"')
    assert capfd.readouterr().err.count("turned") == 2  # it warms up
    assert side() >= 0
    assert capfd.readouterr().err.count("turned") == 1
    assert 2**20 < side.close() < 2**30
    with pytest.raises(RuntimeError, match="ended without the line 'ready'"):
        Turns(f'{sys.executable} -c "pass"')


def test_whole_programs_are_measured_and_failures_are_said(tmp_path):
    side = Whole(f'{sys.executable} -c "sum(range(10**6)); bytearray(64 << 20)"')
    assert side() > 0
    assert side.close() > 64 * 2**20
    with pytest.raises(RuntimeError, match="failed with status 3"):
        Whole(f'{sys.executable} -c "exit(3)"')


def test_records_of_a_file_are_added_and_renewed(tmp_path, capsys):
    file, command = tmp_path / "a.json", f'{sys.executable} -c "pass"'
    for name in ("a", "b", "a"):
        main(["--whole", "--ours", command, "--peer", command, "--pairs", "1", "--name", name, "--into", str(file)])
    assert [record["name"] for record in json.loads(file.read_text())] == ["b", "a"]
    assert "a: ours" in capsys.readouterr().out
