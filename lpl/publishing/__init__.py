"""What others see of a run: its model card, its repository on the Hub, its public recipe.

``run_card.py`` holds the facts of a run, ``card.py`` fills in ``card.md.j2`` with them; ``card_edits.py`` changes a
card that exists. ``publication.py`` decides what is published and when, ``uploads.py`` sends it, ``hub.py`` asks the
Hub once per function. ``lora_metadata.py`` describes LoRA files to other programs, ``licence.py`` finds the base
model's licence, ``public_recipe.py`` writes the recipe for strangers, and ``command.py`` is ``python -m lpl.publish``.
May import: diagnosis and the rooms below. For new text on the card, start with ``card.md.j2``. Tests:
``tests/publishing``.
"""
