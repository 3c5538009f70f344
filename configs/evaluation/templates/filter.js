(() => {
  const [form, question, nearest, count] = ["", "-question", "-nearest", "-count"].map(
    (name) => document.getElementById("filter" + name));
  if (!form) return;
  const articles = [...document.querySelectorAll("article.answer")];
  const apply = () => {
    const words = question.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const article of articles) {
      const text = article.querySelector("h3").textContent.toLowerCase();
      const fits = !nearest.value || article.dataset.nearest.split(" ").includes(nearest.value);
      article.hidden = !fits || !words.every((word) => text.includes(word));
      shown += !article.hidden;
    }
    count.value = shown;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
