"""MQTT: turns messages into events and chats, and tells the house how its users' models are."""
