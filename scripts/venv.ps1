# Dot-sourced from the repository root; the twin of venv.sh.
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

function Find-Python {
    foreach ($candidate in @($env:PYTHON, 'py', 'python3', 'python')) {
        if (-not $candidate -or -not (Get-Command $candidate -ErrorAction SilentlyContinue)) { continue }
        & $candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' | Out-Null
        if ($LASTEXITCODE -eq 0) { return $candidate }
    }
    [Console]::Error.WriteLine('error: no Python 3.10 or newer on PATH: install one (https://www.python.org/downloads/), or name it in PYTHON')
    exit 1
}

function Invoke-Checked {
    # Runs a program with its arguments and ends the script with its exit code if that is not 0.
    $program, $arguments = $args
    & $program @arguments | Out-Host
    if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
}

function Initialize-Venv {
    # Leaves Atlas installed with one extra in .venv and returns the path of its Python.
    param([Parameter(Mandatory)][string]$Extra)

    $python = if ($env:OS -eq 'Windows_NT') { '.venv\Scripts\python.exe' } else { '.venv/bin/python' }
    if (-not (Test-Path $python)) {
        Invoke-Checked (Find-Python) -m venv .venv
    }
    $stamp = ".venv/installed-$Extra.txt"
    $wanted = (Get-Content -Raw -Encoding utf8 pyproject.toml) + (Get-Content -Raw -Encoding utf8 requirements.txt)
    if (-not (Test-Path $stamp) -or (Get-Content -Raw -Encoding utf8 $stamp) -ne $wanted) {
        [Console]::Error.WriteLine('installing Atlas and what it needs into .venv (PyTorch is large: this takes minutes)')
        # First the pin: it decides which PyTorch everything else is resolved against.
        Invoke-Checked $python -m pip install --quiet --disable-pip-version-check --no-input -r requirements.txt
        Invoke-Checked $python -m pip install --quiet --disable-pip-version-check --no-input -e ".[$Extra]"
        Set-Content -NoNewline -Encoding utf8 -Path $stamp -Value $wanted
    }
    return $python
}
