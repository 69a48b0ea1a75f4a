document.querySelectorAll("[data-flip]").forEach(function (box) {
  var prompts = box.querySelectorAll(".prompt"), text = box.querySelector("output"), at = 0;
  function show(next) {
    at = (next + prompts.length) % prompts.length;
    prompts.forEach(function (prompt, i) { prompt.hidden = i !== at; });
    text.textContent = (at + 1) + " of " + prompts.length;
  }
  box.querySelector("[data-step='-1']").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-step='1']").addEventListener("click", function () { show(at + 1); });
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey) { return; }
    if (event.key === "ArrowLeft") { show(at - 1); event.preventDefault(); }
    if (event.key === "ArrowRight" || event.key === " ") { show(at + 1); event.preventDefault(); }
    if (event.key === "Home") { show(0); event.preventDefault(); }
    if (event.key === "End") { show(prompts.length - 1); event.preventDefault(); }
  });
  box.classList.add("live");
  show(0);
});
