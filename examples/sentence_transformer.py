"""An embedding model: the adapter is attached to the transformer inside, and sentence-transformers reads the folder."""

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import lora_lite as ll

BASE = "sentence-transformers/all-MiniLM-L6-v2"
PAIRS = [("a dog runs", "an animal moves"), ("it rains", "the weather is wet"), ("two and two", "four")] * 8


def main(out: str = "runs/sentences", steps: int = 20, base: str = BASE) -> None:
    model = SentenceTransformer(base)
    rows = Dataset.from_list([{"anchor": a, "positive": b} for a, b in PAIRS])
    args = SentenceTransformerTrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
    )
    trainer = ll.trainer(SentenceTransformerTrainer, ll.LoRAConfig(r=8, alpha=16))(
        model=model, args=args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    trainer.save_model()

    again = SentenceTransformer(base)
    ll.load(again, out)  # or, without lora-lite: again.load_adapter(out)
    print(again.similarity(again.encode(["a dog runs"]), again.encode(["an animal moves"])))


if __name__ == "__main__":
    main()
