"""Memory in Hugging Face decoders: where it goes, the classes, attaching and removing, building, saving and loading."""
