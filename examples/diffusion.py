"""The attention of a diffusion model's UNet: a plain loop, and the adapter in the form that diffusers reads."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import lora_lite as ll

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def main(out: str = "runs/diffusion", steps: int = 5, base: str = BASE, subfolder: str | None = "unet") -> None:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder=subfolder)
    noise = DDPMScheduler(num_train_timesteps=1000)
    # names, since a UNet has no blocks of one width in which roles could be told
    names = ("to_q", "to_k", "to_v", r"to_out\.0")
    adapter = ll.attach(unet, ll.LoRAConfig(r=4, alpha=8, target_names=names))
    print(adapter)

    optimizer = torch.optim.AdamW(adapter.param_groups(lr=1e-3))
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    for step in range(steps):
        # instead of these: the VAE's latents of images, and the text encoder's output for their captions
        latents, text = torch.randn(2, unet.config.in_channels, size, size), torch.randn(2, 7, width)
        target, t = torch.randn_like(latents), torch.randint(0, 1000, (2,))
        loss = (unet(noise.add_noise(latents, target, t), t, text).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    ll.save(unet, f"{out}/adapter.safetensors")  # for ll.load(unet, out)
    ll.export(unet, f"{out}/diffusers", format="diffusers")  # for pipe.load_lora_weights
    ll.merge(unet)  # without an adapter's cost, and for readers that know none
    unet.save_pretrained(f"{out}/merged")


if __name__ == "__main__":
    main()
