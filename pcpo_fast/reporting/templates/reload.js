// Not while nobody looks, and the browser keeps the place on the page.
setInterval(function () { if (!document.hidden) { location.reload(); } }, 30000);
