"""The credit rules by name, with the settings that matter to each; :mod:`pcpo_fast.method.credit` has their columns.

A configuration is checked, and the documentation made, without torch.
"""

CREDIT_RULES: dict[str, tuple[str, ...]] = {
    "native": (),
    "proportionate": ("normalize_over",),
    "uniform": ("normalize_over",),
    "pcpo_ratio": ("normalize_over",),
    "tempflow": ("normalize_over",),
    "grpo_guard": ("normalize_scale",),
    "fair_clip": ("normalize_scale",),
    "cps_published": (),
}
"""Every rule: ``normalize_over`` where it sums or averages over the steps, ``normalize_scale`` where its outer scale is
not 1 on average."""


def rules_taking(setting: str) -> list[str]:
    """The names of the rules to which a setting of the ``credit`` section matters."""
    return [name for name, settings in CREDIT_RULES.items() if setting in settings]
