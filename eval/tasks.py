"""What Lucie-7B was evaluated on, and with how many solved examples before each question.

The names are tasks and groups of lm-evaluation-harness; a group brings its members and their mean.
The French leaderboard is not part of lm-evaluation-harness: its YAML files come by --include-path.
"""

import re
from typing import NamedTuple


class Task(NamedTuple):
    """benchmark: as Lucie's published tables spell it. num_fewshot: None is the task's own."""

    benchmark: str
    name: str
    num_fewshot: int | None


FRENCH = {
    "french_bench": {
        "french_bench_arc_challenge": 5,
        "french_bench_grammar": 5,
        "french_bench_hellaswag": 5,
        "french_bench_vocab": 5,
    },
    "french_bench_gen": {
        "french_bench_fquadv2_genq": 5,
        "french_bench_fquadv2_hasAns": 5,
        "french_bench_multifquad": 5,
        "french_bench_orangesum_abstract": 5,
        "french_bench_trivia": 5,
    },
}

ENGLISH = {
    "openllm": {
        "arc_challenge": 25,
        "gsm8k": 5,
        "hellaswag": 10,
        "mmlu": 5,
        "mmlu_continuation": 0,
        "truthfulqa_gen": 0,
        "truthfulqa_mc1": 0,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
    },
    # 3 for BBH, 0 for GPQA, IFEval and MuSR, 4 for MATH, 5 for MMLU-Pro: its files say so
    "leaderboard": {"leaderboard": None},
}

MULTILINGUAL = {
    "okapi": {
        f"{exam}_{language}": 25
        for exam in ("arc", "m_mmlu")
        for language in ("de", "es", "fr", "it")
    }
}

BBH_FR = (
    "compréhension_de_la_date", "compréhension_des_sports", "comptage_d_objets",
    "déduction_logique_cinq_objets", "déduction_logique_sept_objets",
    "déduction_logique_trois_objets", "désambiguïsation_qa", "expressions_booléennes",
    "formes_géométriques", "hyperbate", "jugement_causal", "naviguer", "pingouins_sur_une_table",
    "raisonnement_sur_les_objets_colorés", "recommandation_de_film", "sarcasmes",
    "sophismes_formels", "suivi_objets_mélangés_cinq_objets", "suivi_objets_mélangés_sept_objets",
    "suivi_objets_mélangés_trois_objets", "séquences_temporelles", "toile_de_mensonges",
)  # fmt: skip
MATH_FR = ("algebra", "counting_and_prob", "geometry", "num_theory", "prealgebra", "precalculus")

LEADERBOARD_FR = {
    "fr_leaderboard": {f"leaderboard_bbh_{name}": 3 for name in BBH_FR}
    | {f"leaderboard_gpqa_{name}_fr": 0 for name in ("diamond", "extended", "main")}
    | {"leaderboard_ifeval_fr": 0}
    | {f"leaderboard_math_{name}_hard_fr": 4 for name in MATH_FR}
    | {"leaderboard_mmlu_fr": 5}
    | {
        f"leaderboard_musr_{name}_fr": 0
        for name in ("murder_mysteries", "object_placements", "team_allocation")
    }
}

GROUPS = {
    group: [Task(b, name, shots) for b, tasks in table.items() for name, shots in tasks.items()]
    for group, table in {
        "french": FRENCH,
        "english": ENGLISH,
        "multilingual": MULTILINGUAL,
        "leaderboard-fr": LEADERBOARD_FR,
    }.items()
}
PUBLISHED = {task.name: task for tasks in GROUPS.values() for task in tasks}


def spelt(dataset: str) -> str:
    """A dataset of lm-evaluation-harness as Lucie's tables have it."""
    name = dataset.rpartition("::")[2]  # a group defined within another one
    return re.sub(r"^mmlu_(.+)_continuation$", r"mmlu_continuation_\1", name)
