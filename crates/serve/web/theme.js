// Runs before the first paint, so that a chosen theme does not flash. Nothing chosen: the system decides.
const chosen = localStorage.getItem("draftsmith.theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
