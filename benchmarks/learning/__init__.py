"""What private adapters learn, next to those of stock PEFT."""
