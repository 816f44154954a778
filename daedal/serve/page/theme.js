// Before anything is painted: the colours that were chosen in the settings, else the system's.

try {
  const { theme } = JSON.parse(localStorage.getItem("daedal.settings") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing has nothing to say.
}
