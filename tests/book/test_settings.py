"""A chapter's parameters: a profile's recipe, what is given instead, lists in any spelling, image sizes."""

import numpy as np
import pytest
from PIL import Image

from tdbook import settings
from tdlib.errors import TdlibError, UnknownName

PROFILES = {"quick": {"ratio": [2, 4], "epochs": 1, "lr": 0.1}, "full": {"ratio": 3, "epochs": 90, "lr": 0.1}}
PROFILES |= {"reduced": PROFILES["full"], "modern": PROFILES["full"]}


def test_what_is_given_takes_the_place_of_the_profiles():
    recipe = settings.recipe("quick", PROFILES, ratio=None, epochs=0, lr=None, seed=3, seeds=2)
    assert recipe.ratios == [2.0, 4.0] and recipe.epochs == 0 and recipe.lr == 0.1
    assert recipe.seeds == [3, 4]
    alone = settings.recipe("full", PROFILES)
    assert alone.ratios == [3.0] and alone.seeds == [0]
    assert settings.recipe("full", PROFILES, ratio="2, 3").ratios == [2.0, 3.0]
    assert PROFILES["quick"] == {"ratio": [2, 4], "epochs": 1, "lr": 0.1}
    with pytest.raises(UnknownName, match="quick"):
        settings.recipe("quik", PROFILES)


def test_a_runs_identity_leaves_out_what_it_runs_over():
    recipe = settings.recipe("quick", PROFILES, seed=1)
    assert settings.identity(recipe) == {"profile": "quick", "epochs": 1, "lr": 0.1}


def test_scale_is_full_only_where_nothing_of_the_full_profile_was_reduced():
    def scale(profile, **given):
        return settings.scaled(settings.recipe(profile, PROFILES, **given), "5 epochs")

    assert scale("full") == scale("full", epochs=90, ratio=9, seeds=3, precision="bf16") == "full"
    assert scale("full", epochs=1, limit=200) == "reduced: 5 epochs; the profile's own but for limit, epochs"
    assert scale("full", lr=0.2).startswith("reduced") and scale("full", batch_size=8).startswith("reduced")
    assert scale("reduced") == scale("modern") == "reduced: 5 epochs" and scale("quick", epochs=2) == "quick"


@pytest.mark.parametrize("value", [[2, 4.5], (2, 4.5), "2, 4.5", "2,4.5"])
def test_lists_in_every_spelling(value):
    assert settings.listed(value) == [2.0, 4.5]


def test_single_values_become_lists():
    assert settings.listed(2) == settings.listed("2") == [2.0]
    assert settings.listed("tt, cp", str) == ["tt", "cp"]


def test_the_quick_profile_alone_shrinks_large_images(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(5):
            pixels = np.full((64, 64, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    source = f"imagefolder:{tmp_path}"
    assert settings.load(source, "quick").input_shape == (3, 32, 32)
    assert settings.load(source, "full").input_shape == (3, 64, 64)
    assert settings.load(source, "quick", image_size=48).input_shape == (3, 48, 48)
    assert settings.load("digits", "quick").input_shape == (1, 8, 8)


@pytest.mark.parametrize(("given", "said"), [
    ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
    ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
    ({"epochs": "ten"}, "epochs must be a whole number of at least 0, got 'ten'"),
    ({"ratio": "2, 1"}, "ratio is dense / compressed and must be above 1, got '2, 1'"),
    ({"ratio": "2, x"}, "expected numbers with commas between.*got '2, x'"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(given, said):
    with pytest.raises(TdlibError, match=said):
        settings.recipe("quick", PROFILES, **given)


def test_names_are_checked_and_may_hold_a_comma():
    valid = ["direct", "direct, tuned", "ADMM"]
    assert settings.named("method", "direct, tuned", valid) == ["direct, tuned"]
    for value in ("direct, ADMM", ["direct", "ADMM"]):
        assert settings.named("method", value, valid) == ["direct", "ADMM"]
    with pytest.raises(UnknownName, match=r"unknown method 'nonsense'.*direct, tuned"):
        settings.named("method", ["nonsense"], valid)


def test_the_overview_names_what_lies_in_tables_and_leaves_out_what_is_not_set():
    profiles = {"quick": {"ratio": 2, "before": {"lr": 0.1}, "training": {}, "rho": None}}
    shown = settings.overview(settings.recipe("quick", profiles), "here")["here"].to_dict()
    assert shown == {"profile": "quick", "before: lr": 0.1, "ratios": [2.0], "seeds": [0]}
