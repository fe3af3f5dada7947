import torch

import pydllm
from pydllm.demo import WEIGHTS
from pydllm.demo.evaluate import evaluate
from pydllm.demo.task import held_out_problems

STUDENT = WEIGHTS.parent / "llada-tiny-d3llm"


def test_the_student_takes_less_than_half_the_forwards():
    problems, algorithm = held_out_problems(40), pydllm.EntropyBound(bound=0.3, block_length=24)
    teacher, student = (
        evaluate(pydllm.load(folder, device="cpu"), ("", ""), algorithm, problems)[0]
        for folder in (WEIGHTS, STUDENT)
    )
    assert student.forwards * 2 < teacher.forwards
    assert student.tokens_per_forward > 5
    assert student.exact_percent >= 97.5


def test_it_is_another_model_of_the_same_kind():
    teacher, student = (pydllm.load(folder, device="cpu") for folder in (WEIGHTS, STUDENT))
    assert (student.spec, student.sizes) == (teacher.spec, teacher.sizes)
    hidden = torch.eye(student.sizes.hidden)
    assert not torch.equal(student.head(hidden), teacher.head(hidden))
    size = sum(path.stat().st_size for path in STUDENT.iterdir())
    assert size < 3 * 2**20
