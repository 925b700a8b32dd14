"""What ``--help`` says; text alone, so that it needs no import of torch."""

COMMANDS = """\
usage: python -m gopo_lightning COMMAND --config CONFIG.yaml [--config OVERLAY.yaml] [--FIELD=VALUE]

Train a language model on ranked rewards (GOPO, arXiv 2602.03876) with PyTorch Lightning.

commands:
  fit        train; --ckpt_path last resumes
  validate   mean reward and win rate on the held-out prompts
  test       the same on the test prompts
  predict    write completions and rewards of the predict prompts to predictions.jsonl
  export     a checkpoint as a Hugging Face folder, of LoRA also merged

does ranking help on my task? (each has its own --help)
  inspect    before training: can ranks matter under these rewards?
  duel       which of two policies wins, by a judge, with an interval
  report     finished runs as one page: curves over seeds, paired differences, samples
  compare    train two configs with the same seeds, and report

"""

OWN = {
    "export": "gopo_lightning.commands.export",
    "inspect": "gopo_lightning.commands.inspect",
    "duel": "gopo_lightning.commands.duel",
    "report": "gopo_lightning.commands.report",
    "compare": "gopo_lightning.commands.compare",
}
"""Command → the module whose ``main(arguments)`` it is; the others are Lightning's."""

FIELDS = """\
every field is documented:
  python -m gopo_lightning fit --help                               trainer, export, and these commands
  python -m gopo_lightning fit --model.help GOPOModule              algorithm, policy, loss, sampling
  python -m gopo_lightning fit --model.help RewardModelModule       reward-model training
  python -m gopo_lightning fit --data.help PromptDataModule         prompts
  python -m gopo_lightning fit --data.help PreferenceDataModule     preferences
  python -m gopo_lightning fit --model.init_args.rewards.sources.help gopo_lightning.rewards.SequenceClassifierReward
  python -m gopo_lightning fit --model.init_args.rollout.engine.help gopo_lightning.rollout.TransformersEngine
  python -m gopo_lightning fit --config CONFIG.yaml --print_config  the whole configuration, defaults filled in
"""
