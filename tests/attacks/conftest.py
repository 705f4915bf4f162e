"""The fixture through which attacks choose their tries."""

import pytest
from support.attacks import Attack


@pytest.fixture
def attack(request) -> Attack:
    return Attack(
        request.config.getoption("--attack-seed"), request.config.getoption("--attack-share")
    )
