"use strict";
const $ = id => document.getElementById(id);
const show = (id, value) => { $(id).textContent = value; };
const size = bytes => bytes < 1024 ? `${bytes} bytes` : `${(bytes / 1024).toFixed(1)} KB`;

// Shows the values of sliders beside their names.
function sliders(...ids) {
  for (const id of ids) {
    const update = () => show(`${id}-value`, $(id).value);
    $(id).addEventListener("input", update);
    addEventListener("pageshow", update);  // the browser may restore it
  }
}

// Coloured parts of a text, of which one at a time is picked by pointing at it or with the arrow keys. The page
// says `about` a part what is shown of it.
let picked = -1;
const hint = $("picked").textContent;
function pick(index) {
  const marks = $("heat").children;
  if (!marks.length) return;
  marks[picked]?.removeAttribute("aria-current");
  picked = Math.min(Math.max(index, 0), marks.length - 1);
  const mark = marks[picked];
  mark.setAttribute("aria-current", "true");
  mark.scrollIntoView({ block: "nearest" });
  show("picked", `${JSON.stringify(mark.textContent)}: ${about(mark)}`);
}
function pickNone() { picked = -1; show("picked", hint); }
$("heat").addEventListener("pointerover", event => { if (event.target !== $("heat")) pick([...$("heat").children].indexOf(event.target)); });
$("heat").addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) { event.preventDefault(); pick(picked + step); }
});
