"""How the page looks and what its keys do."""

CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; padding: .75rem !important; }
#title h1 { margin: 0; font-size: 1.35rem; }
#top { align-items: end; flex-wrap: wrap; }
#chat { height: calc(100dvh - 21rem) !important; min-height: 16rem; }
#actions { flex-wrap: wrap; gap: .4rem; }
#actions button { flex: 1 1 6.5rem; min-width: 6.5rem; min-height: 2.6rem; }
#status { min-height: 1.6rem; font-size: .9rem; }
#status .failed { color: var(--error-text-color, #b91c1c); font-weight: 600; }
button:focus-visible, input:focus-visible, textarea:focus-visible, [role=button]:focus-visible {
  outline: 3px solid var(--color-accent); outline-offset: 2px;
}
@media (max-width: 40rem) {
  .gradio-container { padding: .35rem !important; }
  #chat { height: calc(100dvh - 24rem) !important; }
  #actions button { flex: 1 1 30%; min-width: 5.2rem; padding: .3rem; font-size: .85rem; }
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
