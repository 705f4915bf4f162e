"""The fixture through which attacks choose their tries."""

import pytest
from support.attacks import Attack


@pytest.fixture
def attack(request) -> Attack:
    seed = request.config.getoption("--attack-seed")
    print(f"repeat this attack with --attack-seed {seed}")
    return Attack(seed, request.config.getoption("--attack-share"))
