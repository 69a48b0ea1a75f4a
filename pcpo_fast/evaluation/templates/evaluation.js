document.querySelectorAll("[data-flip]").forEach(function (box) {
  var prompts = box.querySelectorAll(".prompt"), text = box.querySelector("output"), at = 0;
  function show(next) {
    at = (next + prompts.length) % prompts.length;
    prompts.forEach(function (prompt, i) { prompt.hidden = i !== at; });
    text.textContent = (at + 1) + " of " + prompts.length;
    history.replaceState(null, "", "#" + prompts[at].id);  // so that a reload, or a link, shows this prompt
  }
  box.querySelector("[data-step='-1']").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-step='1']").addEventListener("click", function () { show(at + 1); });
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey) { return; }
    if (event.key === " " && event.target.closest("button, summary")) { return; }  // presses that
    var steps = { ArrowLeft: at - 1, ArrowRight: at + 1, " ": at + 1, Home: 0, End: prompts.length - 1 };
    if (event.key in steps) { show(steps[event.key]); event.preventDefault(); }
  });
  box.classList.add("live");
  show(Math.max(0, Array.from(prompts).findIndex(function (prompt) { return "#" + prompt.id === location.hash; })));
});
