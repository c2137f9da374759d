"""The chat page, in Gradio, over the same models and limits as the API."""
