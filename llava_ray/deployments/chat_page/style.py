"""The page's CSS and keyboard shortcuts."""

CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container main { padding: 0 !important; }
.gradio-container .fillable { padding: clamp(.4rem, 2vw, .75rem) !important; max-width: none !important; }
.gradio-container .column { gap: .6rem; }
#title h1 { margin: 0; font-size: 1.35rem; }
#top { align-items: center; }
#top > * { min-width: 0 !important; }
#chat { height: calc(100dvh - 16.5rem) !important; min-height: 16rem; }
#chat img { max-height: 16rem; width: auto; }
#chat button[aria-label="Share"], #chat button[title="Share"] { display: none; }
#actions { gap: .4rem; }
#actions button { flex: 1 1 0; min-width: 5.6rem; min-height: 2.5rem; }
#status { min-height: 1.5rem; font-size: .9rem; line-height: 1.5rem; }
#status .failed { color: var(--error-text-color, #b91c1c); font-weight: 600; }
button:focus-visible, input:focus-visible, textarea:focus-visible, [role=button]:focus-visible {
  outline: 3px solid var(--color-accent); outline-offset: 2px;
}
/* Gradio scopes what stands in a media query to the inside of its own containers. */
@media (max-width: 40rem) {
  #chat { height: calc(100dvh - 22.5rem) !important; }
  #actions button { flex: 1 1 22%; min-width: 4.4rem; padding: .3rem .1rem; font-size: .78rem; }
}
"""

# Escape stops an answer, wherever the focus is.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stop = document.querySelector("#stop");
  if (stop && !stop.disabled) stop.click();
});
</script>
"""

# Writes the text of a hidden box to a file that the browser saves.
DOWNLOAD = """
(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "chat.json";
  link.click();
  URL.revokeObjectURL(link.href);
}
"""
