"""
A sample of tests/kill.py: runs of all four stages on one rank and of one stage on two, each killed
at a system call or at any time, and resumed.
"""
import os
import re

import pytest

from conftest import start

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kill.py forks')


@pytest.mark.parametrize('args, n_lines', [
    (['--ranks=1', '--placed=1', '--random=1'], 40),  # 5 kinds of run, each in 7 states and random
    (['--ranks=2', '--placed=1', '--random=1', '--stages=sft'], 8)])
def test_killed_runs_resume_bit_for_bit(args, n_lines):
    process = start('tests/kill.py', *args)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    counts = re.findall(r'(\d+) runs killed, +(\d+) resumed equal', stdout)
    assert len(counts) == n_lines
    assert all(count == ('1', '1') for count in counts)
