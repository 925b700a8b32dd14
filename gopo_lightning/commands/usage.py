"""What ``--help`` says; text alone, so that it needs no import of torch."""

from difflib import get_close_matches

COMMANDS = """\
usage: gopo-lightning COMMAND --config CONFIG [--config OVERLAY] [--FIELD=VALUE]

CONFIG is a file, or the name of a config of ours: `gopo-lightning config list`.

Train a language model on ranked rewards (GOPO, arXiv 2602.03876) with PyTorch Lightning.

commands:
  fit        train; --ckpt_path last resumes
  validate   mean reward and win rate on the held-out prompts
  test       the same on the test prompts
  predict    write completions and rewards of the predict prompts to predictions.jsonl
  export     a checkpoint as a Hugging Face folder, of LoRA also merged

to begin with:
  quickstart a reward model and a policy, trained in minutes on this machine; needs the extra `quickstart`
  config     list, show or copy the configs that come with the package

before a run:
  estimate   memory of each phase and time of a step: does it fit, and what helps most?

does ranking help on my task? (each has its own --help)
  inspect    before training: can ranks matter under these rewards?
  duel       which of two policies wins, by a judge, with an interval
  report     finished runs as one page: curves over seeds, paired differences, samples
  compare    train two configs with the same seeds, and report

rewards by hand:
  rank       order completions on a page of this machine; the verdicts train a reward model or a policy

An error of yours is one sentence and exit code 2; --debug, or GOPO_DEBUG=1, shows its traceback. --version.

"""

OWN = {
    "export": "gopo_lightning.commands.export",
    "estimate": "gopo_lightning.commands.estimate",
    "inspect": "gopo_lightning.commands.inspect",
    "duel": "gopo_lightning.commands.duel",
    "report": "gopo_lightning.commands.report",
    "compare": "gopo_lightning.commands.compare",
    "rank": "gopo_lightning.commands.rank",
    "config": "gopo_lightning.commands.config",
    "quickstart": "gopo_lightning.commands.quickstart",
}
"""Command → the module whose ``main(arguments)`` it is."""
OF_LIGHTNING = ("fit", "validate", "test", "predict")
"""Methods of its Trainer."""

FIELDS = """\
every field is documented:
  gopo-lightning fit --help                               trainer, export, and these commands
  gopo-lightning fit --model.help GOPOModule              algorithm, policy, loss, sampling
  gopo-lightning fit --model.help RewardModelModule       reward-model training
  gopo-lightning fit --data.help PromptDataModule         prompts
  gopo-lightning fit --data.help PreferenceDataModule     preferences
  gopo-lightning fit --model.init_args.rewards.sources.help gopo_lightning.rewards.SequenceClassifierReward
  gopo-lightning fit --model.init_args.rollout.engine.help gopo_lightning.rollout.TransformersEngine
  gopo-lightning fit --config CONFIG.yaml --print_config  the whole configuration, defaults filled in
"""


def check_command(name: str) -> None:
    """ValueError unless there is a command of that ``name``."""
    commands = [*OF_LIGHTNING, *OWN]
    if name.startswith("-"):
        raise ValueError(f"{name} stands where the command belongs. The first word is one of {', '.join(commands)}.")
    if name not in commands:
        near = get_close_matches(name, commands, 1)
        advice = f"did you mean {near[0]!r}?" if near else f"The first word is one of {', '.join(commands)}."
        raise ValueError(f"{name!r} is no command. {advice}")
