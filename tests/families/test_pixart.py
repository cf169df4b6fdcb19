"""PixArt: the image's size."""

from tiny_families import CPU, batch_of, load


def test_pixart_is_told_the_size_where_the_pipeline_tells_it(pixart_alpha_pipeline, pixart_sigma_pipeline):
    alpha = load(pixart_alpha_pipeline)
    told = alpha.conditions(batch_of(alpha, target_size=(24, 32)), CPU)
    assert told["resolution"].tolist() == [[24, 32]] * 3 and told["aspect_ratio"].tolist() == [[0.75]] * 3
    small = load(pixart_alpha_pipeline)
    small.denoiser.register_to_config(sample_size=64)
    for family in (small, load(pixart_sigma_pipeline)):
        assert set(family.conditions(batch_of(family), CPU)) == {"encoder_hidden_states", "encoder_attention_mask"}
