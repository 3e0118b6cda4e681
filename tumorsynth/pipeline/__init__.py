"""The stages of `SynthesizeTumor`: validate, place, displace, paint, finish."""
