"""Tasks for lm-evaluation-harness made of the demo's problems: YAML and JSON lines in a folder.

python -m tests.integrations.harness_tasks FOLDER 40
"""

import json
import random
import sys
from pathlib import Path

from pydllm.demo.task import held_out_problems

GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs: {{until: ["sam"], max_gen_toks: 48, do_sample: false}}
filter_list:
  - name: last
    filter:
      - {{function: regex, regex_pattern: "answer (\\\\d+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{worked}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

ROLL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""


def documents(count):
    """Problems with their worked solution less its number, and four numbers to choose from."""
    rng = random.Random(0)
    for problem in held_out_problems(count):
        right = problem.answer
        wrong = rng.sample([n for n in range(40) if n != right], 3)
        choices = sorted(map(str, [right, *wrong]))
        yield {
            "prompt": problem.prompt,
            "answer": str(right),
            "worked": f"{problem.prompt} {problem.solution.rpartition(' ')[0]}",
            "choices": choices,
            "label": choices.index(str(right)),
            "text": f"{problem.prompt} {problem.solution}",
        }


def write(folder, count):
    """The tasks word_problems, word_problems_choice and word_problems_text."""
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents(count)))
    for suffix, template in {"": GENERATE, "_choice": CHOOSE, "_text": ROLL}.items():
        name = f"word_problems{suffix}"
        (folder / f"{name}.yaml").write_text(template.format(name=name, data=data))


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    write(place, int(sys.argv[2]))
